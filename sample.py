"""Ask a trained model about pictures, and watch it answer.

    laptop:   python sample.py --preset tiny --image list.png "What number stands beside Iran?"
    one GPU:  python sample.py --model runs/7b/phase2 --image a.png --image b.png "What changed?"
    a talk:   python sample.py --preset tiny --image chart.png     # an empty line ends it
    pruned:   python sample.py --model runs/1.5b-mlp/phase2 --prune pdrop --image a.png "Who?"
    (eight GPUs answer no single question sooner: torchrun eval.py asks many at once)
"""
import argparse
import sys
from pathlib import Path

from compared.choices import add_choices, add_name, folder_of
from compared.precision import add_precision
from compared.variants import load_model, read_variant
from data import load_image
from model import PRESETS


def show(row, piece):
    """Print a piece of the answer at once. `row` is that of the batch, which has only one here."""
    print(piece, end="", flush=True)


def reply(model, pictures, question, max_new_tokens):
    """Print the answer as it is generated, and return it. `question`: a text or a list of turns."""
    answers = model.generate([pictures or None], [question], max_new_tokens, on_token=show)
    print()
    return answers[0]


def talk(model, pictures, max_new_tokens):
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
        asked = turns + [{"from": "human", "value": question}]
        try:
            answer = reply(model, pictures, asked, max_new_tokens)
        except KeyboardInterrupt:                           # ends this answer, not the talk
            print()
        else:
            turns = asked + [{"from": "gpt", "value": answer}]


def main(argv=None):
    """Answer one question, or talk if there is none; returns the answer or the turns.

    Raises ValueError for bad values and OSError for missing files.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", nargs="?", help="left out: a conversation on standard input")
    add("--image", type=Path, action="append", default=[], help="may be repeated, shown in order")
    add("--preset", default="0.5b", choices=PRESETS, help="the model is runs/<preset>/phase2")
    add_name(parser)
    add("--model", type=Path, help="folder of another trained model")
    add("--max-new-tokens", type=int, default=128)
    add("--prune", metavar="RULE", help="fastv:K=2,R=0.5, pdrop, resize: see compared/")
    add_precision(parser)
    add_choices(parser)
    args = parser.parse_args(argv)
    folder = args.model or Path("runs") / folder_of(args) / "phase2"
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty; leave it out to open a conversation")
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {folder}; train one with: "
                                f"python train.py --preset {args.preset}")

    pictures = [load_image(path) for path in args.image]
    model = load_model(folder, *read_variant(args, folder), args.precision, args.int8)
    if args.question is None:
        return talk(model, pictures, args.max_new_tokens)
    return reply(model, pictures, args.question, args.max_new_tokens)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
