"""One of several tensor-parallel ranks: writes the documents of `test_decoding` by each of its runs.

python tensor_worker.py FOLDER OUTPUT
"""

import json
import os
import sys
from pathlib import Path

from megamug.inference import load_run
from tests.generation.language_run import MODELS
from tests.generation.test_decoding import SAMPLINGS, prompts, write

folder, output = map(Path, sys.argv[1:])
told = {}
for name in MODELS:
    with load_run(folder / name) as run:
        assert run.world.tp_size == 2
        told[name] = [write(run, prompts(run.task.vocabulary), sampling) for sampling in SAMPLINGS]
(output / f"{os.environ['RANK']}.json").write_text(json.dumps(told))
