"""Rows of a stream, each noted with the state after it, from the last noted one on: `stream_rows.py MIX TOKENIZER
ROWS FILE`. To be killed and begun again."""

import hashlib
import pickle
import sys
from pathlib import Path

from rmkv_cli.config import load_mix, mix_path
from rmkv_cli.data.lanes import Lanes
from rmkv_cli.data.stream import Stream
from rmkv_cli.files import atomic_file
from rmkv_cli.tokenizer import Tokenizer


def main():
    mix, tokenizer, wanted, file = sys.argv[1], Tokenizer.load(Path(sys.argv[2])), int(sys.argv[3]), Path(sys.argv[4])
    with Stream(load_mix(mix_path(mix)), Path(), tokenizer) as stream:
        lanes, rows = Lanes(stream, 4, tokenizer.eod), []
        if file.exists():
            rows, state = pickle.loads(file.read_bytes())
            lanes.load_state_dict(state)
        while len(rows) < wanted:
            row = lanes.next(300)
            arrays = (row.input_ids, row.targets, row.document_ids)
            rows.append(hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())
            with atomic_file(file) as aside:
                aside.write_bytes(pickle.dumps((rows, lanes.state_dict())))


if __name__ == "__main__":
    main()
