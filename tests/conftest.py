"""Let the tests, and the programs that they start, import the files at the root; leave the machine some cores."""
import os
import sys
from pathlib import Path

import torch

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
