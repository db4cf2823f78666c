"""Customise gpt-oss on the MXFP4 weights as released: recipe, data, model, train, evaluate, export."""

__version__ = "0.1.0"
