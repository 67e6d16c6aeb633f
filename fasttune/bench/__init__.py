"""The same job on several arms, interleaved, with the losses compared."""
