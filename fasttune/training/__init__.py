"""What `fasttune train` is made of; train.py is its straight line."""
