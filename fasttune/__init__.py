"""fasttune: fine-tune an open model on one GPU as fast as the chip allows, and prove the number."""

__version__ = "0.1.0"
