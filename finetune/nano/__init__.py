"""How the bundled model `nano` is made: its skills, its tokenizer, its training and its files."""
