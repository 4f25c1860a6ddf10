"""A small Llama-shaped decoder, pre-trained here: no pretrained one installs from a package registry.

    python -m loraplus.tasks.decoder --output data/decoder

`text` makes the tokenizer and the sequences, `pretrain` trains, `card` measures and describes what came out.
"""
