"""From a data set to token sequences: reading, generating, packing, digests."""
