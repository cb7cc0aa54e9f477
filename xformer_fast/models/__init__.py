"""Small models of every transformer family, made of `xformer_fast.layers`, one file a family."""
