"""What runs on a GPU: Triton kernels, the expert layer over widened rows, FlexAttention, streaming.

Every kernel has a twin in plain torch (`steps.TorchSteps`), so all but the kernels themselves runs and is
tested without a GPU, and the kernels run there under Triton's interpreter.
"""
