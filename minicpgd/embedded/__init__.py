"""The tiny model that ships: weights and tokenizer, remade by `minicpgd pretrain --seed 0`."""
