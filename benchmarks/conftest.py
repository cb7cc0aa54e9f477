def pytest_addoption(parser):
    parser.addoption(
        "--benchmark-cases", choices=("tiny", "quick", "all"), default="tiny", help="size of the benchmark cases"
    )
