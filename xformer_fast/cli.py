"""The command line: `xformer-fast info`, `xformer-fast bench`, `xformer-fast compare`.

bench and compare need the `benchmarks` folder of a checkout (found beside the package or in the current directory);
it is not part of an installed wheel.
"""

import argparse
import importlib
import sys
from pathlib import Path

_NO_BENCHMARKS = (
    "this command needs the folder `benchmarks` of a source checkout, which is neither beside the package nor in the "
    "current directory: run it from the root of a clone"
)


def _benchmarks(module: str):
    """`benchmarks.<module>` of the checkout, or None."""
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "benchmarks" / "cases.py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            try:
                return importlib.import_module(f"benchmarks.{module}")
            except ModuleNotFoundError as error:
                sys.exit(f"benchmarks need {error.name}: pip install '.[bench]' in the checkout")
    return None


def _info(_: argparse.Namespace) -> int:
    import xformer_fast

    print(xformer_fast.info())
    return 0


def _missing(_: argparse.Namespace) -> int:
    print(_NO_BENCHMARKS, file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="xformer-fast", description="Fused attention: what runs here, and how fast.")
    commands = parser.add_subparsers(required=True, metavar="info|bench|compare")
    info = commands.add_parser("info", help="ops, backends, and why one does not run here")
    info.set_defaults(run=_info)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, module, text in (
        ("bench", "run", "time cases beside other implementations, correctness first, rows into a CSV"),
        ("compare", "compare", "a model before and after patch: equal results, speed, memory; or the same of an op"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=_missing)
        if name == chosen:  # importing torch and the cases takes seconds: only for the command that is asked for
            benchmark = _benchmarks(module)
            if benchmark:
                benchmark.add_arguments(command)
                command.set_defaults(run=benchmark.execute)
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _missing:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
