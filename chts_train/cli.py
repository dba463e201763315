"""The command ``chts``: arguments, help, and errors in one line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from . import __version__
from .configs import PRESETS
from .methods import METHODS
from .optim import OPTIMIZERS
from .parallel import PARALLEL, leave_at_once, rank_from_environment
from .settings import COMPILE

ERROR = 2
DEBUG = "CHTS_DEBUG"

MAIN_HELP = """\
Sparse training that stays sparse: transposable 2:4 and 1:4 weights whose topology evolves (CHTs24, CHTs14).

  chts pretrain                    train a small Llama on the text of this Python's library, nothing to download
  chts eval runs/tiny-chts24-s0    perplexity on held-out text
  chts info                        what this machine can run, and with which kernels
"""

PRETRAIN_HELP = """\
examples:
  chts pretrain                                             tiny Llama, CHTs24, text of Python's library
  chts pretrain --method dense --seed 1                     a baseline; see the methods below
  chts pretrain --data book.txt notes/ --steps 2000         text files and folders
  chts pretrain --preset 60m --data train.u16.xz --tokenizer bpe.json --batch-size 256 --micro-batch 64
  chts pretrain --preset vit-tiny --data digits             images
  chts pretrain --set model.hidden_size=192 --set data.val_fraction=0.1
  chts pretrain --resume runs/tiny-chts24-s0                go on after Ctrl-C, a crash or kill -9
  torchrun --nproc-per-node 8 -m chts_train pretrain --preset 1b --parallel fsdp      several GPUs

a run folder holds:
  config.json, metrics.jsonl (loss, perplexity, turnover, ...), updates.jsonl (every topology update, layer by layer),
  checkpoints/ (safetensors and JSON, the last ones), plots/*.png and, at the end, summary.json
"""

RETRAIN_HELP = """\
examples:
  chts pretrain --method dense --out runs/dense             first a dense model ...
  chts retrain runs/dense                                   ... pruned, then trained on with CHTs24 (eDSrT)
  chts retrain runs/dense --method nvidia                   the same with the mask of the pruning kept
  chts retrain model.safetensors --preset 60m --data train.u16.xz

Steps, data and learning rate are those of the dense run (or of --preset); T rises from 1 to 3.
"""

EVAL_HELP = """\
examples:
  chts eval runs/tiny-chts24-s0
  chts eval runs/tiny-chts24-s0/checkpoints/step-00000300 --data other.txt --json
"""

EXPORT_HELP = """\
examples:
  chts export runs/tiny-chts24-s0                           to runs/tiny-chts24-s0/export
  chts export runs/tiny-chts24-s0 --out model --dtype bfloat16
  chts export runs/tiny-chts24-s0 --packed                  compressed: chts_train.packed.load_packed reads it

A Llama then loads with transformers.AutoModelForCausalLM.from_pretrained("model").
"""

PLOT_HELP = """\
examples:
  chts plot runs/tiny-chts24-s0                             to runs/tiny-chts24-s0/plots
  chts plot runs/tiny-chts24-s0 runs/tiny-dense-s0 --out compare
"""

INFO_HELP = """\
examples:
  chts info                                                 devices, versions, kernels
  chts info runs/tiny-chts24-s0                             what is in a run folder or checkpoint
  chts info 1b                                              memory that training a preset takes, dense and sparse
"""


class Parser(argparse.ArgumentParser):
    """Errors in one line; help texts keep their lines."""

    def __init__(self, **options: object) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        if rank_from_environment():  # the first process says it for all
            self.exit(ERROR)
        self.exit(ERROR, f"{self.prog}: error: {' '.join(message.split())} (help: {self.prog} --help)\n")


def make_parser() -> Parser:
    """The parser of the command line; every command's function is in ``chts_train.commands``."""
    parser = Parser(prog="chts", description=MAIN_HELP)
    parser.add_argument("--version", action="version", version=f"chts {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, text: str, epilog: str) -> Parser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog)

    pretrain = command("pretrain", "train a sparse (or dense) model from scratch", PRETRAIN_HELP + "\n" + tables())
    pretrain.add_argument("--preset", metavar="NAME", help="model and training settings (default: tiny)")
    pretrain.add_argument("--resume", metavar="RUN", help="continue this run folder, with the settings it has")
    add_training(pretrain)

    retrain = command("retrain", "prune a dense model and train it on, sparse (eDSrT)", RETRAIN_HELP + "\n" + tables())
    retrain.add_argument("dense", metavar="DENSE", help="dense run folder, checkpoint, or safetensors file")
    retrain.add_argument(
        "--preset", metavar="NAME", help="settings to use instead of the dense run's; needed for a file"
    )
    add_training(retrain)

    evaluate = command("eval", "evaluate a run on held-out data", EVAL_HELP)
    evaluate.add_argument("run", metavar="RUN", help="run folder (its latest checkpoint) or checkpoint folder")
    evaluate.add_argument("--data", nargs="+", metavar="SPEC", help="other data than the run's")
    evaluate.add_argument("--max-tokens", type=int, metavar="N", help="evaluate about this many tokens (images)")
    evaluate.add_argument("--precision", metavar="P", help="fp32, bf16 or auto (default: the run's)")
    evaluate.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_machine(evaluate)

    export = command("export", "write a run's model as dense weights with zeros (safetensors)", EXPORT_HELP)
    export.add_argument("run", metavar="RUN", help="run folder (its latest checkpoint) or checkpoint folder")
    export.add_argument("--out", metavar="FOLDER", help="folder to write (default: RUN/export)")
    export.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: as trained)")
    export.add_argument("--packed", action="store_true", help="write pattern ids and values instead of dense weights")
    export.add_argument("--force", action="store_true", help="replace an earlier export")

    plot = command("plot", "draw one run, or several over each other", PLOT_HELP)
    plot.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    plot.add_argument(
        "--out", metavar="FOLDER", help="folder for the PNG files (default: RUN/plots; several runs: plots)"
    )

    info = command("info", "show what a run or checkpoint holds, or what this machine can do", INFO_HELP)
    info.add_argument("run", nargs="?", metavar="RUN", help="run folder, checkpoint folder or preset; without it: the machine")
    return parser


def add_training(parser: Parser) -> None:
    """The options that pretrain and retrain share. All default to None: then the preset decides."""
    what = parser.add_argument_group("what to train")
    what.add_argument("--method", metavar="NAME", help="how the topology evolves, or a baseline (default: chts24)")
    what.add_argument("--data", nargs="+", metavar="SPEC", help="text: stdlib, files, folders, token arrays (.npy .u16 "
                      ".bin, .xz), a Hugging Face name; images: digits, an npz, a folder, a torchvision name")  # fmt: skip
    what.add_argument("--tokenizer", metavar="FILE", help="tokenizers JSON file (default: bytes)")
    what.add_argument("--vocab-size", type=int, metavar="N", help="at least the number of token ids (default: that)")
    what.add_argument("--max-bytes", type=int, metavar="N", help="read at most this much text")
    what.add_argument("--seed", type=int, metavar="N", help="of weights, batches and topology (default: 0)")
    what.add_argument(
        "--out", metavar="FOLDER", help="run folder, new or empty (default: runs/<preset>-<method>-s<seed>)"
    )

    how = parser.add_argument_group("training")
    how.add_argument("--steps", type=int, metavar="N", help="optimizer steps; warm-up scales along")
    how.add_argument("--batch-size", type=int, metavar="N", help="sequences (images) of an optimizer step")
    how.add_argument("--micro-batch", type=int, metavar="N", help="how many of them at a time (gradient accumulation)")
    how.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sequence")
    how.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    how.add_argument("--warmup-steps", type=int, metavar="N", help="linear warm-up to it")
    how.add_argument("--min-lr-ratio", type=float, metavar="X", help="the cosine ends at this fraction of it")
    how.add_argument("--optimizer", metavar="NAME", help=", ".join(OPTIMIZERS))
    how.add_argument("--weight-decay", type=float, metavar="X")
    how.add_argument("--precision", metavar="P", help="fp32, bf16 (autocast, fp32 masters), auto: bf16 on GPUs")
    how.add_argument("--eval-interval", type=int, metavar="N", help="steps between evaluations")
    how.add_argument("--eval-tokens", type=int, metavar="N", help="tokens (images) of one; 20 times as many at the end")

    evolution = parser.add_argument_group("evolution of the topology")
    evolution.add_argument("--zeta", type=float, metavar="X", help="fraction of links removed in an update")
    evolution.add_argument("--zeta-end", type=float, metavar="X", help="that fraction where updates end (default: the same)")
    evolution.add_argument("--interval", type=int, metavar="N", help="steps between updates")
    evolution.add_argument("--stop-fraction", type=float, metavar="X", help="updates end at this fraction of the steps")
    evolution.add_argument("--t-start", type=float, metavar="T", help="temperature of the soft removal, at the start")
    evolution.add_argument("--t-end", type=float, metavar="T", help="and where updates end")
    evolution.add_argument("--lr-ramp-steps", type=int, metavar="N", help="learning rate rises again after an update")
    evolution.add_argument("--srste-lambda", type=float, metavar="X", help="decay of the SR-STE methods")

    parser.add_argument("--set", action="append", metavar="KEY=VALUE", default=[],
                        help="any field of the config, e.g. model.num_hidden_layers=6 (repeatable)")  # fmt: skip
    outputs = parser.add_argument_group("machine and output (also with --resume)")
    add_machine(outputs)
    outputs.add_argument(
        "--log-interval", type=int, default=10, metavar="N", help="steps between log lines (default: 10)"
    )
    outputs.add_argument("--save-interval", type=int, default=0, metavar="N", help="steps between checkpoints "
                         "(default: as evaluations)")  # fmt: skip
    outputs.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints to keep (default: 2)")
    outputs.add_argument("--quiet", action="store_true", help="no progress")
    outputs.add_argument("--compile", default="off", choices=COMPILE, metavar="C", help="torch.compile: off (the default), blocks, "
                         "graph (also CUDA graphs; one GPU), or auto: graph where it can be")  # fmt: skip
    outputs.add_argument("--parallel", default="auto", choices=PARALLEL, metavar="P", help="of the processes that torchrun "
                         "started: ddp, fsdp, or auto: ddp (any number of them computes the same run)")  # fmt: skip


def add_machine(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:1 (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def tables() -> str:
    """The presets and methods by name, for help texts."""
    lines = ["presets:"]
    for name, config in PRESETS.items():
        lines.append(
            f"  {name:10} {config.task}, {config.total_steps:,} steps of {config.batch_size}, lr {config.lr:g}"
        )
    lines.append("\nmethods:")
    width = max(map(len, METHODS))
    return "\n".join([*lines, *(f"  {name:{width}} {method.description}" for name, method in METHODS.items())])


def one_line(error: BaseException) -> str:
    """An error for people: its message in one line, with its type when the type says more than "wrong value"."""
    text = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, ValueError | ImportError | OSError | RuntimeError | TypeError)
    return text if expected else f"{type(error).__name__}: {text}"


def spin_briefly() -> None:
    """Restart this process with short spinning of OpenMP threads, unless that is set or a GPU does the work.

    By default the threads of torch spin for milliseconds while they wait for each other. When anything else runs on the
    machine, training on all its cores was seen to be 30 times slower; with 10,000 turns it shares the cores. The OpenMP
    runtime reads the variable only once, when torch is loaded, which has happened by now.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ or torch.cuda.is_available():
        return
    os.environ["GOMP_SPINCOUNT"] = "10000"
    os.execv(sys.executable, sys.orig_argv)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error, 130 and 143 after SIGINT and SIGTERM.

    Set the environment variable CHTS_DEBUG to see the traceback of an error.
    """
    options = make_parser().parse_args(arguments)
    if arguments is None and options.command in ("pretrain", "retrain"):
        spin_briefly()
    from . import commands

    try:
        code = getattr(commands, options.command)(options)
        if arguments is None:
            leave_at_once(code)
        return code
    except KeyboardInterrupt:
        print(f"chts {options.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        rank = rank_from_environment()
        who = f"chts {options.command}" + f" (process {rank})" * (rank > 0)
        print(f"{who}: error: {one_line(error)}", file=sys.stderr)
        return ERROR


if __name__ == "__main__":
    sys.exit(main())
