import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests import the scripts and modules from a clone, not installed
cache = tempfile.TemporaryDirectory()
os.environ["NANORS_CACHE"] = cache.name  # also for the scripts that tests start: nothing goes to the home folder
if os.environ.get("NANORS_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits are promised, and compared, on a CPU; test_gpu.py needs the GPU
torch.set_num_threads(1)  # two threads that wait for each other on a busy machine take ten times as long
