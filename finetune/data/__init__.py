"""Files and hub data sets, made conversations, token ids with a mask, and packed batches."""

from finetune.data.examples import Example, Examples
from finetune.data.packing import PackedDataset, best_fit, collate
from finetune.data.prepare import Prepared, held_out_conversations, prepare_data, read_conversations
from finetune.data.read import Row, read_rows
from finetune.data.report import DataReport
from finetune.data.shapes import row_to_conversation

__all__ = [
    "DataReport",
    "Example",
    "Examples",
    "PackedDataset",
    "Prepared",
    "Row",
    "best_fit",
    "collate",
    "held_out_conversations",
    "prepare_data",
    "read_conversations",
    "read_rows",
    "row_to_conversation",
]
