"""`finetune bench`: the same packed tokens through finetune and through another stack, and what each takes.

Both sides train one checkpoint of random weights from one adapter, each in a process of its own, one after
the other: so nothing of the one is in the other's memory. Both run in TRL's trainer with its fused head, so
that the loss is the same code; the stock side is given our attention over packed documents, for its own would
let them see each other; gradient checkpointing is on for both or for neither.
"""
