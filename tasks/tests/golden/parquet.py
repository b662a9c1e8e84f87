"""Writes prompts.parquet and pairs.parquet, small data sets with nested columns, as pyarrow writes them.
Run: pip install pyarrow==26.0.1; python parquet.py"""

import pathlib

import pyarrow
import pyarrow.parquet

HERE = pathlib.Path(__file__).parent


def turn(role, content):
    return {"role": role, "content": content}


def write(name, rows, compression):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), HERE / name, compression=compression, row_group_size=2)


write(
    "prompts.parquet",
    [
        {"question": "1 + 1 = ?", "chat": [turn("user", "1 + 1 = ?")], "answer": 2, "share": 0.5, "easy": True},
        {"question": "Zürich — où?", "chat": [turn("system", "be brief"), turn("user", "Zürich — où?")], "answer": -7, "share": 1.25, "easy": False},
        {"question": "", "chat": [turn("user", "")], "answer": None, "share": None, "easy": None},
    ],
    "zstd",
)
write(
    "pairs.parquet",
    [
        {
            "prompt": "hello",
            "chosen": [turn("user", "hello"), turn("assistant", "hi, how are you?")],
            "rejected": [turn("user", "hello"), turn("assistant", "go away")],
        }
    ],
    "snappy",
)
