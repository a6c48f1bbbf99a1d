"""Ask a trained model about pictures, and watch it answer.

    laptop:   python sample.py --preset tiny --image list.png "What number stands beside Iran?"
    one GPU:  python sample.py --model runs/7b/phase2 --image a.png --image b.png "What changed?"
    a talk:   python sample.py --preset tiny --image chart.png     # an empty line ends it
    sampled:  python sample.py --preset 7b --image a.png --temperature 0.7 --seed 1 "Tell a story."
    pruned:   python sample.py --model runs/1.5b-mlp/phase2 --prune pdrop --image a.png "Who?"
    (eight GPUs answer no single question sooner: torchrun eval.py asks many at once)

Without --temperature the answer is greedy: always the most likely next token.
"""
import argparse
import math
import re
import sys
from pathlib import Path

import torch

from compared.choices import add_choices, add_name, model_folder
from compared.precision import add_precision
from compared.variants import load_model, read_variant
from data import load_image
from model import PRESETS, most_likely

WEB_ADDRESS = re.compile(r"\w+://?")        # pathlib makes https:/ of https://


class Sampler:
    """Draws the next token of every answer: `model.generate(..., choose=Sampler(0.7, 0.9))`.

    temperature: logits are divided by it. Near 0 the most likely token is always drawn, at 1 each
        token with the probability that the model gives it, above 1 they come more evenly.
    top_p: only the fewest tokens that together have this probability (arXiv:1904.09751).
    seed: row r of a batch is drawn with seed + r, as it would be alone with that seed. So the same
        question asked several times in a batch gets several answers; each can be repeated.
    Raises ValueError for values without meaning.
    """

    def __init__(self, temperature=1.0, top_p=1.0, seed=0):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature}: give a number above 0; without one the "
                             "answer is greedy")
        if not 0 < top_p <= 1:
            raise ValueError(f"top-p {top_p}: give a share above 0, at most 1")
        if not 0 <= seed < 2**62:
            raise ValueError(f"seed {seed}: give a whole number from 0, of at most 18 digits")
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.generators = []                # one a row, on the CPU: a GPU draws other numbers

    def __call__(self, logits):
        """Logits (B, V) -> tokens (B,)."""
        for row in range(len(self.generators), len(logits)):
            self.generators.append(torch.Generator().manual_seed(self.seed + row))
        draws = [torch.rand(1, generator=generator) for generator in self.generators[:len(logits)]]
        draws = torch.stack(draws).to(logits.device)                     # (B, 1), in [0, 1)
        logits = logits.float() - logits.float().amax(-1, keepdim=True)  # so that none overflows
        probs, tokens = (logits / self.temperature).softmax(-1).sort(-1, descending=True)
        before = probs.cumsum(-1) - probs                                # (B, V)
        kept = torch.where(before < self.top_p, probs, 0)                # at least the first
        ends = kept.cumsum(-1)                                           # (B, V)
        place = torch.searchsorted(ends, draws * ends[:, -1:], right=True)       # (B, 1)
        last = (kept > 0).sum(-1, keepdim=True) - 1                      # (B, 1) if sums overshoot
        return tokens.gather(-1, place.minimum(last)).squeeze(-1)


# --------------------------------------------------------------------------- the command line

def add_asking(parser):
    """Add the flags that say which model answers, and how."""
    add = parser.add_argument
    add("--preset", default="0.5b", choices=PRESETS, help="the model is runs/<preset>/phase2")
    add_name(parser)
    add("--model", type=Path, help="folder of another trained model")
    add("--max-new-tokens", type=int, default=128)
    add("--system", metavar="TEXT", help="a system prompt, in place of the one of training")
    add("--temperature", type=float, default=0.0, help="draw the answer; 0, the default, is greedy")
    add("--top-p", type=float, help="draw from the tokens that hold this share (default 1)")
    add("--seed", type=int, help="of the draws (default 0): the same seed, the same answer")
    add_precision(parser)


def chooser(args):
    """What chooses the tokens of a new conversation: the greedy choice, or a Sampler.

    Raises ValueError for values without meaning.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    given = {"top_p": args.top_p, "seed": args.seed}
    given = {name: value for name, value in given.items() if value is not None}
    if args.temperature != 0:
        return Sampler(args.temperature, **given)
    if given:
        name, value = next(iter(given.items()))
        raise ValueError(f"--{name.replace('_', '-')} {value} draws nothing without a temperature: "
                         "give --temperature 0.7, or another number above 0")
    return most_likely


def with_system(args, turns):
    """The turns of a conversation, after the system prompt of the command line if it has one."""
    return turns if args.system is None else [{"role": "system", "content": args.system}, *turns]


def open_picture(path):
    """A path of the command line -> a picture, as data.load_image reads it and with its errors."""
    if WEB_ADDRESS.match(str(path)):
        raise ValueError(f"--image {path}: nothing is fetched from the web; save the picture and "
                         "give the path of its file")
    return load_image(path)


# ------------------------------------------------------------------------------------- asking

def show(row, piece):
    """Print a piece of the answer at once. `row` is that of the batch, which has only one here."""
    print(piece, end="", flush=True)


def reply(model, pictures, turns, args, choose):
    """Print the answer to the last of some turns as it is generated, and return it."""
    answers = model.generate([pictures or None], [with_system(args, turns)], args.max_new_tokens,
                             on_token=show, choose=choose)
    print()
    return answers[0]


def talk(model, pictures, args, choose):
    """Question after question, each with all that was said before; returns the turns.

    An empty line, the end of input or Ctrl-C at the prompt ends it.
    """
    turns = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return turns
        if not question:
            return turns
        longer = [*turns, {"role": "user", "content": question}]
        try:
            answer = reply(model, pictures, longer, args, choose)
        except KeyboardInterrupt:                           # ends this answer, not the talk
            print()
        except ValueError as error:                         # of this question: the next may do
            print(error, file=sys.stderr)
        else:
            turns = [*longer, {"role": "assistant", "content": answer}]


def main(argv=None):
    """Answer one question, or talk if there is none; returns the answer or the turns.

    Raises ValueError for bad values and OSError for missing files.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", nargs="?", help="left out: a conversation on standard input")
    add("--image", type=Path, action="append", default=[], help="may be repeated, shown in order")
    add_asking(parser)
    add("--prune", metavar="RULE", help="fastv:K=2,R=0.5, pdrop, resize: see compared/")
    add_choices(parser)
    args = parser.parse_args(argv)
    choose = chooser(args)
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty; leave it out to open a conversation")
    folder = model_folder(args)

    pictures = [open_picture(path) for path in args.image]
    model = load_model(folder, *read_variant(args, folder), args.precision, args.int8)
    if args.question is None:
        return talk(model, pictures, args, choose)
    question = {"role": "user", "content": args.question}
    return reply(model, pictures, [question], args, choose)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
