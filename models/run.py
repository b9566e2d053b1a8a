"""What surrounds a training loop: flags, processes, signals, the run folder, averaged weights.

    rank, world, device = run.start(seed=0)     one process, or one of those of torchrun
    out = run.folder(args.out, "runs/demo", args.resume)
    out = run.claim(out, args.out, args.resume) just before the first write; no second run gets it
    stop = run.Stop()                           Ctrl-C and SIGTERM: finish the step, save, leave
    ...
    run.end()

Nothing here knows a loop or calls back into a script. OMP_WAIT_POLICY is set by the scripts, since
it is read when torch loads.
"""
import argparse
import contextlib
import copy
import ctypes
import errno
import math
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.check import flags
from data.common import (
    MAX_PIXELS, PIXELS_VARIABLE, BadInput, as_text, escaped, nfc, number, print_anything,
    read_json, temporary_of, try_lock)
from data.datasets import are_bands
from data.files import SYSTEM_FILES
from data.ranges import is_range, parse_range

from .checkpoint import load_state
from .losses import OPTIONS, parse_loss, uses
from .vit import AMX
from .weights import BadWeights, check_there

# Flags that change no result beyond its rounding: they may stand where nothing needs them.
OF_THE_MACHINE = ("batch_size", "workers", "cache", "device")
# Flags that training scripts once had, and what there is instead.
REMOVED = {
    "--taps": "the head reads four evenly spaced blocks",
    "--feat-norm": "the final norm is always on every map",
    "--output-stride": "segmentation scripts have --model deeplabv3-os8",
    "--freeze-bn": "batches of one freeze BatchNorm by themselves",
    "--clip": "the limit is CLIP at the top of the script",
    "--overlap": "windows overlap by OVERLAP at the top of the script; eval.py has --overlap",
    "--check-data": "CHECKED masks are always read first",
    "--group-regex": 'dataset.json has "scene": REGEX',
    "--cycle": "train_kd.py has --restarts STEPS MULT",
    "--teacher-weights": "the teacher's run knows its backbone file",
    "--hard-iou": "the limit is HARD_IOU at the top of eval.py",
    "--hard-limits": "the limits are LIMITS in data/samplers.py",
    "--hard-weights": "the weights are WEIGHTS in data/samplers.py",
    "--grow-from": "the start is GROW_FROM at the top of train_points.py",
    "--grow-above": "the limit is GROW_ABOVE at the top of train_points.py",
    "--mixup": "train_seg.py and train_cls.py mix images",
    "--cutmix": "train_seg.py and train_cls.py mix images",
    "--compile": "train_seg.py compiles",
    "--patience": "train_seg.py stops early",
    "--save": "train_seg.py and train_cls.py save heads alone",
    "--accum": "train_seg.py and train_kd.py accumulate",
    "--label-smoothing": "train_seg.py, train_kd.py and train_cls.py smooth labels",
}


# ---- flags

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default; one that depends on other flags stands in the help, in brackets."""

    def _get_help_string(self, action):
        # `is`, because a default of 0 equals False and shall be shown.
        if any(action.default is hidden for hidden in (None, False, argparse.SUPPRESS)):
            return action.help
        return f"{action.help} (default: %(default)s)"


class MaxPixels(argparse.Action):
    """--max-pixels goes into the environment, which reading processes inherit.

    It is no setting of a run, so args and last.pt do not have it.
    """

    def __call__(self, parser, args, value, option_string=None):
        os.environ[PIXELS_VARIABLE] = str(value)


class Parser(flags.Parser):
    """The parser of data/, which also answers flags of earlier versions."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)
        self.add_argument("--max-pixels", action=MaxPixels, type=between(1, 2**40, int),
                          metavar="N", default=argparse.SUPPRESS,
                          help=f"larger images are not read as a whole ({MAX_PIXELS})")

    def check_line(self, words: list[str]) -> None:
        """Also an error for flags that are gone."""
        super().check_line(words)
        for word in words:
            flag = word.split("=")[0]
            if flag in REMOVED and flag not in self._option_string_actions:
                self.error(f"{flag} is gone: {REMOVED[flag]}; leave it out")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; empty values and --weights that are not there are errors."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if value == "" or isinstance(value, list) and "" in value:
                self.error(f"{name_of(action)} is empty; is the shell variable set?")
        weights = getattr(found, "weights", None)
        if weights not in (None, "none"):
            try:
                check_there(weights)
            except BadWeights as e:
                self.error(str(e))
        return found, rest

    def typed(self, args: argparse.Namespace) -> dict[str, str]:
        """{name: flag} of what stands in a command line and is not the default."""
        found = {}
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if value not in (None, [], action.default):
                found[action.dest] = name_of(action)
        return found

    def only(self, args: argparse.Namespace, what: str, allowed: Iterable[str]) -> None:
        """An error where a command line has more than these: it would be passed over."""
        allowed = {*allowed, *OF_THE_MACHINE}
        strange = [flag for name, flag in self.typed(args).items() if name not in allowed]
        if strange:
            self.error(f"{what}; leave {' and '.join(strange)} out")


def name_of(action: argparse.Action) -> str:
    """How a user calls what he types: --with, or images."""
    return (action.option_strings or [action.metavar or action.dest])[0]


def between(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""
    def in_range(text):
        try:
            value = number(text, kind)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: expected {what} from {low} to {high}")
        return value

    return in_range


# argparse types that many flags share.
COUNT = between(1, 2**31, int)
WHOLE = between(0, 2**31, int)
SHARE = between(0, 1)
RATE = between(0, 10)
bands = flags.bands


def device_name(text: str) -> str:
    """An argparse type: what --device may be."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text}: expected auto, cpu, cuda, or cuda:1 for the "
                                         "second GPU")
    return text


def blocks(text: str) -> str:
    """An argparse type: what --unfreeze may be, "all" or a number of blocks."""
    if text == "all":
        return text
    try:
        count = number(text, int)
    except ValueError:
        count = -1
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of blocks, or all")
    return str(count)


class InputRange(argparse.Action):
    """--input-range LOW HIGH, a pair for each of three bands, or percentiles: data/ranges.py."""

    def __call__(self, parser, args, words, option_string=None):
        try:
            setattr(args, self.dest, parse_range(words))
        except BadInput as e:
            parser.error(str(e))


def check_rising(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Ends the program unless each of these flags, if given, is two finite rising numbers."""
    for name in names:
        pair = getattr(args, name)
        if not pair:
            continue
        if not -math.inf < pair[0] <= pair[1] < math.inf:
            parser.error(f"--{name.replace('_', '-')} {pair[0]} {pair[1]}: expected the lower "
                         "number first")


def only_with(parser: Parser, args: argparse.Namespace, owner: str,
              values: str | tuple[str, ...], *flags: str) -> None:
    """Ends the program where one of the flags was typed although --owner is none of the values."""
    chosen = getattr(args, owner)
    values = (values,) if isinstance(values, str) else values
    # With --resume the defaults are those of the run, where the flags may have been typed.
    if chosen in values or args.resume:
        return
    typed = parser.typed(args)
    for flag in flags:
        if flag in typed:
            parser.error(f"{typed[flag]} goes with --{owner} {' or '.join(values)}, not {chosen}; "
                         "leave it out")


def check_loss(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where a flag was typed that no term of --loss takes."""
    terms = parse_loss(args.loss)
    typed = {"class_weights": getattr(args, "class_weights", None) not in (None, "none"),
             "smoothing": getattr(args, "label_smoothing", 0) > 0}
    flags = {"class_weights": "--class-weights", "smoothing": "--label-smoothing"}
    for option, flag in flags.items():
        if typed[option] and not uses(terms, option) and not args.resume:
            takers = [name for name, options in OPTIONS.items() if option in options]
            parser.error(f"{flag} goes with {' or '.join(takers)} in --loss, not {args.loss}; leave it "
                         "out")


def fill_unfreeze(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sets --unfreeze where it was not typed: a loaded ViT stays as it is, all else learns.

    Ends the program where another flag needs a backbone that stays as it is.
    """
    scratch = args.weights == "none"
    if args.unfreeze is None:
        args.unfreeze = "all" if scratch or args.model != "vit" else "0"
    if not scratch and args.unfreeze == "0":
        for flag in () if args.resume else ("backbone_lr", "layer_decay"):
            if getattr(args, flag) is not None:
                parser.error(f"--{flag.replace('_', '-')} is of a backbone that learns; type "
                             "--unfreeze all, or leave it out")
        return
    asked = []
    if getattr(args, "save", "all") == "head":
        asked.append("--save head")
    if getattr(args, "cache_features", None):
        asked.append("--cache-features")
    for flag in asked:
        parser.error(f"{flag} needs a frozen backbone from --weights; type --weights FILE without "
                     f"--unfreeze, or leave {flag} out")


def parse(parser: Parser, argv: list[str] | None = None, movable: tuple[str, ...] = (),
          longer: str = "steps") -> argparse.Namespace:
    """The flags. With --resume RUN the defaults are those in RUN/last.pt: what differs was typed.

    Only the flags in `movable` may differ then, and the one in `longer` may grow.
    """
    args = parser.parse_args(argv)
    if not args.resume:
        return args
    check_saved(Path(args.resume))
    stored = load_state(Path(args.resume) / "last.pt").get("args")
    if not isinstance(stored, dict) or stored.keys() != vars(args).keys():
        began = command_of(Path(args.resume), "an unknown command")
        raise BadInput(f"{args.resume}/last.pt: of another script, or of an earlier version of this "
                       f"one; go on with the code that began it ({began}), or start a new run")
    # last.pt comes from a file, and its flags go past argparse's checks.
    for action in parser._actions:
        value = stored.get(action.dest)
        if action.dest in stored and not could_be_typed(action, value):
            raise BadInput(f"{args.resume}/last.pt: {action.option_strings[-1]} is "
                           f"{str(value)[:60]!r} in it; start a new run")
    parser.set_defaults(**stored | {"resume": args.resume, "out": args.resume})
    args = parser.parse_args(argv)
    if Path(args.out).resolve() != Path(args.resume).resolve():
        raise BadInput(f"--out {args.out} with --resume {args.resume}: a run goes on in its own "
                       "folder; leave --out out")
    args.out = args.resume
    for name, was in stored.items():
        now = getattr(args, name)
        if now == was or name in (*movable, "resume", "out"):
            continue
        if name == longer and now > was:
            continue
        more = f", and only more {longer}" if name == longer else ""
        raise BadInput(f"{args.resume}: was trained with {name} = {was}, not {now}{more}; leave "
                       "the flag out, or start a new run")
    return args


def could_be_typed(action: argparse.Action, value) -> bool:
    """Is this a value that the flag can have, by its default, choices or type?"""
    if value is None:
        return True
    # The type too: True == 1, and 1 == 1.0.
    if type(value) is type(action.default) and value == action.default:
        return True
    if action.nargs == 0:
        return type(value) is bool
    if isinstance(action, InputRange):
        return isinstance(value, (str, list)) and is_range(value)
    if action.type is bands:
        return isinstance(value, list) and are_bands(value)
    if isinstance(value, (list, tuple)) != (action.nargs is not None):
        return False
    words = [value] if action.nargs is None else value
    if isinstance(action.nargs, int) and len(words) != action.nargs:
        return False
    return all(is_word(action, word) for word in words)


def is_word(action: argparse.Action, value) -> bool:
    """Could one word behind the flag have become this value?"""
    if action.choices and value not in action.choices:
        return False
    if action.type is None:
        return isinstance(value, str)
    try:
        return action.type(str(value)) == value
    except argparse.ArgumentTypeError:
        return False


def check_saved(out: Path) -> None:
    """BadInput where a run was ended before its first last.pt: it is started again."""
    if (out / "last.pt").exists():
        return
    if not (out / ".lock").exists() or not is_free(out):
        return  # no run's folder; whoever reads its last.pt says so
    raise BadInput(f"{out}: was ended before its first last.pt, so there is nothing to resume; "
                   f"start it again: {command_of(out, 'its command without --resume')}")


def command_of(out: Path, unknown: str) -> str:
    """The command that began a run, as its protocol.json has it; else `unknown`."""
    if not (out / "protocol.json").exists():
        return unknown
    return read_json(out / "protocol.json").get("command", unknown)


# ---- errors

@contextlib.contextmanager
def one_line_errors(lower: str = "--batch-size"):
    """Around main(): what a user can mend ends as one line on stderr and exit code 2.

    `lower` these flags where memory was too small.
    """
    print_anything()
    try:
        yield
    except (BadInput, BadWeights, OSError, MemoryError, RuntimeError) as e:
        line = about_reader(e) or about_memory(e, lower) or about_ranks(e)
        if line is None and isinstance(e, (MemoryError, RuntimeError)):
            raise  # a fault of the code
        if line is None:
            line = str(e) or repr(e)
            # An error in a DataLoader worker arrives behind its traceback. Ours may have several
            # lines, of others the last one is shown.
            if line.startswith("Caught "):
                before = "BadInput: " if "BadInput: " in line else "\n"
                line = line.rpartition(before)[2]
        print(f"error: {escaped(line.rstrip())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted{go_on()}", file=sys.stderr)
        sys.exit(130)


def about_reader(e: Exception) -> str | None:
    """One line where a process of a DataLoader is gone, which arrives in the midst of anything."""
    text = f"{e.__cause__}\n{e}"  # of which the first may know the signal
    found = re.search(r"DataLoader worker .*(killed by signal: ([\w ]+)|exited unexpectedly)", text)
    if not found:
        return None
    ended = f"was killed ({found[2]})" if found[2] else found[1]
    cause, fewer = "out of memory", "--workers 1"
    if found[2] == "Bus error":
        cause, fewer = "out of shared memory, /dev/shm", "--workers 0"
    return f"a reading process {ended}: {cause}? try {fewer}{go_on(fewer)}"


def about_memory(e: Exception, lower: str) -> str | None:
    """One line where the memory of the GPU or of the machine was too small."""
    text = str(e)
    signs = ("out of memory", "allocate memory", "MemoryError", "bad_alloc", "ALLOC_FAILED")
    full = isinstance(e, MemoryError) or getattr(e, "errno", None) == errno.ENOMEM
    if isinstance(e, RuntimeError):
        full = full or any(sign in text for sign in signs)
    if not full:
        return None
    where = " of the GPU" if re.search("CUDA|HIP|CUBLAS|CUDNN", text) else ""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)|nable to allocate ([\d.]+ \w+)", text)
    amount = f" (asked for {asked[1] or asked[2]})" if asked else ""
    if "DataLoader worker" in text:
        return f"a reading process is out of memory{amount}; lower --workers{go_on('--workers 1')}"
    return f"out of memory{where}{amount}; lower {lower}"


def about_ranks(e: Exception) -> str | None:
    """One line where another process of torchrun is gone, or has not answered in time."""
    gone = r"Connection (closed|reset|refused)|closed by peer|Broken pipe"
    late = r"[Tt]im(ed|ing) out|[Tt]imeout"
    if not dist.is_initialized() or not isinstance(e, RuntimeError):
        return None
    if not re.search(f"{gone}|{late}", str(e)):
        return None
    what = "has ended" if re.search(gone, str(e)) else "has not answered in time"
    return (f"rank {dist.get_rank()} of {dist.get_world_size()}: another rank {what}; its own "
            f"message says why{go_on()}")


def go_on(*flags: str) -> str:
    """The end of a message: how to go on with this process's run, where it has saved something."""
    folders = [Path(file.name).parent for file in LOCKS]
    if not folders or not (folders[-1] / "last.pt").exists():
        return ""
    return f"; go on: {' '.join([again(folders[-1]), *flags])}"


# ---- processes

def start(seed: int | None = None, wanted: str = "auto",
          hours: float = 3) -> tuple[int, int, torch.device]:
    """-> rank, number of processes, device. Under torchrun it also joins the group of processes.

    A seed makes all ranks begin with the same random numbers, and so with the same network.
    wanted: --device. hours: how long a rank may wait for another one.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # fp32 means fp32: by default cuDNN's convolutions would round to TF32's ten bits.
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    else:
        tune_cpu()
    if world > 1 and not dist.is_initialized():
        # When a rank dies, torchrun ends the others, and gloo tells them at once. The time-out is
        # for NCCL under other launchers, where nobody would tell them.
        backend = "nccl" if device.type == "cuda" else "gloo"
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(hours=hours), device_id=bound)
    if seed is not None:
        torch.manual_seed(seed)
    return rank, world, device


def choose_device(wanted: str) -> torch.device:
    """--device -> the device of this process; BadInput where the machine has none like it."""
    kind, _, number = wanted.partition(":")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or kind == "auto" and seen == 0:
        return torch.device("cpu")
    if seen == 0:
        raise BadInput(f"--device {wanted}: torch {torch.__version__} sees no GPU{why_no_gpu()}, or "
                       "type --device cpu")

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1)
    visible = "GPU" if seen == 1 else "GPUs"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        visible += f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']})"
    if number and processes > 1:
        raise BadInput(f"--device {wanted} for {processes} processes: each takes a GPU of its own; "
                       f"type --device cuda, and CUDA_VISIBLE_DEVICES={number},... before torchrun")
    if processes > seen:
        raise BadInput(f"{processes} processes on a machine where torch sees {seen} {visible}; type "
                       f"torchrun --nproc_per_node={seen}, or --device cpu")
    if number and int(number) >= seen:
        raise BadInput(f"--device {wanted}: torch sees {seen} {visible}, the last one is "
                       f"cuda:{seen - 1}; type --device cuda:{seen - 1}")
    return torch.device("cuda", int(number or local_rank))


def why_no_gpu() -> str:
    """Why torch sees none, and what to do about it."""
    if not (torch.version.cuda or torch.version.hip):
        return ", for it is a build for CPUs; install one for your GPU (pytorch.org/get-started)"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f" in CUDA_VISIBLE_DEVICES='{hidden}'; correct or unset that"
    return f" by its CUDA {torch.version.cuda}; see whether nvidia-smi lists one with that version"


def tune_cpu() -> None:
    """Twice the speed of matrix products, and no page faults at every step."""
    # With AMX, "medium" would mean bf16; without it oneDNN keeps fp32 accuracy at twice the speed.
    # On a Xeon with AMX, MKL at "highest" is as fast as oneDNN in fp32.
    if not AMX:
        torch.set_float32_matmul_precision("medium")
    # Keep freed memory instead of returning it to the system, or every step pays page faults.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc; musl has none
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def seed_torch(*numbers: int) -> None:
    """Seeds torch's own random numbers with a function of these, such as seed, step, rank."""
    rng = np.random.default_rng(numbers)
    torch.manual_seed(int(rng.integers(2**63)))


def fast_bf16(device: torch.device) -> bool:
    """Is bf16 done in hardware? Older GPUs and CPUs only imitate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Private API: False where this torch does not have it.
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def precision(amp: bool, device: torch.device) -> str:
    """bf16 on cuda:0, or fp32, and whether a GPU is one without bf16 in hardware."""
    text = f"{'bf16' if amp else 'fp32'} on {device}"
    if device.type == "cuda" and not fast_bf16(device):
        name = torch.cuda.get_device_name(device)
        if amp:
            return f"{text}, which {name} only imitates; --amp off is faster"
        return f"{text}, for {name} has no bf16"
    return text


def use_bf16(asked: str, trained: str, device: torch.device) -> bool:
    """For a finished run: --amp auto, bf16 or off -> bf16? auto: as it was trained, where fast."""
    if asked == "auto":
        return trained == "bf16" and fast_bf16(device)
    return asked == "bf16"


def to_device(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on its way to the device; the program does not wait until it is there."""
    # From memory that is not pinned CUDA would first finish all that it has been told to do.
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many processes there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def over_ranks(t: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def parallel(net: nn.Module, device: torch.device) -> nn.Module:
    """The network, under torchrun in DDP: called like it, its gradients are means over ranks."""
    if not dist.is_initialized():
        return net
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(net, device_ids=ids)


def synchronise_norms(net: nn.Module, device: torch.device) -> nn.Module:
    """The network, on several GPUs with BatchNorm over all of them (torch has none for CPUs)."""
    if dist.is_initialized() and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net


def from_all_ranks(items: list) -> list:
    """The items of every rank, those of rank 0 first, on every rank."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def gather(part: torch.Tensor, n: int, device: torch.device) -> torch.Tensor:
    """Rows rank, rank + world, ... of n from every rank -> all rows (n, D) fp32 on every CPU."""
    if not dist.is_initialized():
        return part
    rank, world = dist.get_rank(), dist.get_world_size()
    widths = from_all_ranks([part.shape[1]])  # 0 where a rank had no row
    whole = torch.zeros(n, max(widths), device=device)
    if len(part):
        whole[rank::world] = part.to(device)
    return over_ranks(whole).cpu()


def wait() -> None:
    """Until all ranks are here, such as behind a file that rank 0 writes and all read."""
    if dist.is_initialized():
        dist.barrier()


def end() -> None:
    """Leaves the group of processes."""
    # gloo's threads may still hold tensors of the last collective; Python's end under them aborts.
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- signals

class Patient:
    """stdout or stderr whose reader may go away: that must not end a step before it is saved."""

    left = False  # has this program been told to stop?

    def __init__(self, stream):
        self.stream = stream
        self.terminal = stream.isatty()

    def attempt(self, work: Callable, *args):
        """A closed terminal fails before its signal comes, the pipe of a remote shell with it."""
        try:
            return work(*args)
        except OSError:
            if not self.terminal and not Patient.left:
                raise

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Stop:
    """Ctrl-C, SIGTERM and a closed terminal only set .signal, so that a step ends and is saved.

    A second signal ends at once.
    """

    def __init__(self):
        self.signal = 0
        numbers = [signal.SIGINT, signal.SIGTERM]
        # nohup has a closed terminal ignored. Windows has no such signal.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        # What is printed until the step is saved must not end it.
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream and not isinstance(stream, Patient):
                setattr(sys, name, Patient(stream))

    def note(self, number, frame):
        """The handler of the signals."""
        self.signal = number
        Patient.left = True
        if os.environ.get("RANK", "0") == "0":
            # Not print(), which may be at work just now.
            with contextlib.suppress(OSError):
                os.write(2, b"the step ends and is saved; once more ends at once, without\n")
        self.release()

    def told(self, device: torch.device) -> bool:
        """Was any rank told to stop?"""
        return bool(over_ranks(torch.tensor(self.signal, device=device)))

    def exit(self) -> None:
        """Ends the program with the code of its signal; SIGTERM's where another rank was told."""
        sys.exit(128 + (self.signal or signal.SIGTERM))

    def release(self) -> None:
        """Gives the signals back: what follows has nothing to save."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def keep_signals_from_worker(worker_id: int) -> None:
    """For DataLoader's worker_init_fn: only the main process gets Ctrl-C, and its end ends the worker."""
    # A terminal sends it to a whole group of processes: a worker makes a group of its own.
    # Ignoring signals would not do: SIGTERM is how the main process ends its workers.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    # With its pipe full it would wait for ever for a main process that was killed.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ---- the run folder

# What a run has written before its first last.pt, or a probe before its weights.
FIRST = {".lock", "split.json", "files.json", "protocol.json", "points.csv", "map.json",
         "replicated.txt", "difficulty.json", "log.jsonl", "curves.png", "bars.png",
         "confusion.png", "samples.png"}
LATER = {"last.pt", "best.safetensors", "results.json"}


def is_temporary(name: str) -> bool:
    """Has data/common.py's replace() left this file of a run, because it was killed?"""
    return temporary_of(name) in FIRST | LATER


def is_free(folder: Path) -> bool:
    """Nothing there, or what a run left that was ended before its first last.pt."""
    if not os.path.lexists(folder):
        return True
    if not folder.is_dir():
        return False
    left = {file.name for file in folder.iterdir()}
    # What Finder and Explorer leave belongs to nobody.
    left = {name for name in left if not is_temporary(name) and not name.startswith("._")}
    left = {name for name in left if name.lower() not in SYSTEM_FILES | {".ds_store"}}
    if not left:
        return True
    # Files of such names are only a run's beside its .lock.
    return ".lock" in left and left <= FIRST


def numbered(default: str) -> Path:
    """runs/demo, or the first of runs/demo-2, runs/demo-3, ... that is free."""
    folder, i = Path(default), 1
    while not is_free(folder):
        i += 1
        folder = Path(f"{default}-{i}")
    return folder


def refusal(out: Path) -> str | None:
    """Why a new run cannot have this folder."""
    if is_busy(out):
        return f"{out}: another run is writing there; wait for it, or name another --out"
    if (out / "last.pt").exists():
        return (f"{out}: holds a run; type --resume {shlex.quote(str(out))} to go on with it, or "
                "another --out")
    if (out / "results.json").exists() and (out / "protocol.json").exists():
        return f"{out}: holds a finished run; type another --out"
    if not is_free(out):
        return f"{out}: there, and no run of this script; name another --out"
    return None


def folder(wanted: str | None, default: str, resume: str | None) -> Path:
    """Where the run will write. A `wanted` folder that holds something is a BadInput.

    Makes nothing yet, so that an error in the flags leaves no folder; see claim().
    """
    # A run to go on with is locked at once, before its last.pt is read.
    if resume:
        return claim(Path(resume), None, resume)

    def choose():
        if not wanted:
            return numbered(default)
        if as_text(nfc(wanted)) != nfc(wanted):
            raise BadInput(f"{wanted}: safetensors cannot open a path that is not UTF-8; name "
                           "another --out")
        why_not = refusal(Path(wanted))
        if why_not:
            raise BadInput(why_not)
        return Path(wanted)

    return from_rank_0(choose)


def claim(out: Path, wanted: str | None, resume: str | None) -> Path:
    """Makes the folder and locks it while this process lives -> the folder, the same on all ranks.

    Call it just before the first write: a default folder that was taken meanwhile is numbered on.
    """
    def take():
        base, i = stem_of(out), 1
        place = out
        while not lock(place, going_on=bool(resume)):
            if resume:
                raise BadInput(f"{place}: another run is writing there; wait for it, or end it")
            if wanted:
                raise BadInput(refusal(place) or f"{place}: another run has just been there; type "
                               "the command again, or name another --out")
            i += 1
            place = Path(f"{base}-{i}")
        return place

    claimed = from_rank_0(take)
    check_shared(claimed)
    return claimed


def check_shared(out: Path) -> None:
    """BadInput, on all ranks, where the machine of one does not see the folder that rank 0 made."""
    blind = [] if (out / ".lock").exists() else [socket.gethostname()]
    blind = from_all_ranks(blind)
    if blind:
        raise BadInput(f"{out}: rank 0 has made it, and it is not there on "
                       f"{', '.join(sorted(set(blind)))}; all machines read the run folder: type "
                       "--out with a folder on a disk that they share")


def from_rank_0(make: Callable):
    """What make() returns on rank 0, on all ranks; its BadInput likewise."""
    answer = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = make()
        except (BadInput, OSError) as e:
            answer = e
    if dist.is_initialized():
        shared = [answer]
        dist.broadcast_object_list(shared)
        answer = shared[0]
    if isinstance(answer, Exception):
        raise answer
    return answer


def stem_of(out: Path) -> Path:
    """runs/demo-2 -> runs/demo, if numbered() made it; runs/site-2023 is a name of its own."""
    stem, _, number = out.name.rpartition("-")
    without = out.with_name(stem) if stem and number.isdecimal() else out
    return without if without.exists() else out


LOCKS = []  # open files: closing one would end its lock


def lock(out: Path, going_on: bool) -> bool:
    """Has this process the folder for itself, and is it free, or a run to go on with?

    The system ends the lock with the process, killed or not. Nothing is touched in a folder that
    is not free.
    """
    if not going_on and not is_free(out):
        return False
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"{out}: cannot be made ({e.strerror}); name an --out below a folder that you "
                       "may write to") from None
    file = open(out / ".lock", "a")
    locked = try_lock(file)
    usable = locked is not False  # None: the system has no locks
    # Another run may have come and gone since the look above.
    if not going_on and not is_free(out):
        usable = False
    if not usable:
        file.close()
        return False
    LOCKS.append(file)
    # Half-written files of a run that was killed; without a lock its writer may still live.
    if locked:
        for old in out.iterdir():
            if is_temporary(old.name):
                old.unlink()
    return True


def is_busy(out: Path) -> bool:
    """Does another process hold the folder? Not to be asked of one that this process holds."""
    try:
        with open(out / ".lock", "r+") as file:
            return try_lock(file) is False
    except OSError:  # not there, or not ours
        return False


def again(out: Path) -> str:
    """The command that goes on with the run in this folder, with as many processes."""
    start = "python"
    if dist.is_initialized():
        start = f"torchrun --standalone --nproc_per_node={dist.get_world_size()}"
    return f"{start} {Path(sys.argv[0]).name} --resume {shlex.quote(str(out))}"


def device_change(last: dict, device: torch.device) -> str:
    """The end of a line: that a run goes on on another kind of device than last.pt was saved on."""
    was = last.get("device", device.type)  # earlier versions have not kept it
    if was == device.type:
        return ""
    return f"; on {device.type} after {was}: no longer bit for bit"


def score(name: str, best: float) -> str:
    """"mIoU 0.8123", or that there was no validation, for which a run remembers -1."""
    return f"{name} {best:.4f}" if best >= 0 else f"{name}: none so far"


def check_same(out: Path, last: dict, same: dict) -> None:
    """BadInput unless last.pt holds under each key what `same` holds, such as sha256 of weights."""
    advice = dict(world="start it with as many: torchrun --nproc_per_node={was}, or plain python "
                        "for 1",
                  amp="choose it by --amp bf16 or off",
                  weights="name the file with that sha256", teacher="name the run with that sha256",
                  labels="the classes or ignored values have changed; undo that",
                  reading='"bands" or "input_range" in dataset.json have changed; undo that',
                  stored="images of another size were added; take them out",
                  kept_features="leave --cache-features out")
    for key, now in same.items():
        was = last.get(key, now)  # earlier versions have kept fewer
        if was != now:
            what = "processes" if key == "world" else key
            raise BadInput(f"{out}: was trained with {what} {was}, not {now}; "
                           f"{advice[key].format(was=was)}, or start a new run")


def facts(device: torch.device, world: int) -> dict:
    """What protocol.json tells of the command and the machine."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return dict(command=shlex.join(["python", *sys.argv]), torch=torch.__version__,
                python=sys.version.split()[0], world=world, device=name)


# ---- averaged weights

class Ema:
    """Exponential moving average of a network's weights: .net is what to evaluate and to keep."""

    def __init__(self, net: nn.Module, decay: float):
        self.live, self.decay = net, decay
        # Frozen parameters are shared, not copied.
        frozen = {id(p): p for p in net.parameters() if not p.requires_grad}
        self.net = copy.deepcopy(net, frozen)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step 0, 1, ...: young averages forget the initial weights faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, now in zip(self.net.parameters(), self.live.parameters()):
            if now.requires_grad:
                average.lerp_(now, 1 - decay)
        # BatchNorm's statistics belong to the weights. With those of the live network an average of
        # 1,265 steps on EuroSAT had an accuracy of .70, with its own .87, the live network .63.
        for average, now in zip(self.net.buffers(), self.live.buffers()):
            if average.is_floating_point():
                average.lerp_(now, 1 - decay)
            else:
                average.copy_(now)
