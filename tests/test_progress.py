from rmkv_cli.progress import plural


def test_one_takes_the_singular():
    assert [plural(number, "token") for number in (0, 1, 2, 12345)] == [
        *("0 tokens", "1 token", "2 tokens", "12,345 tokens")
    ]
