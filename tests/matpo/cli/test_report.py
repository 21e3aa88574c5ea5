"""The end of a run in people's words."""

from __future__ import annotations

from matpo.cli.display import share, spark
from matpo.cli.report import plain


def test_control_tokens_of_either_chat_template_are_left_out() -> None:
    assert plain("<|im_start|>user\n347<|im_end|>\n<|im_start|>assistant\n") == "347"
    assert plain("<|user|> report <|end|> <|assistant|>") == "report"


def test_a_call_reads_as_a_call() -> None:
    call = '<tool_call>{"name": "worker", "arguments": {"subtask": " employer Ugo "}}</tool_call> <|end|>'
    assert plain(call) == "worker(employer Ugo)"


def test_a_row_of_bars_goes_from_the_smallest_to_the_largest_value() -> None:
    assert spark([0.0, 0.5, 1.0]) == "▁▅█"
    assert spark([2.0, 2.0]) == "▁▁"


def test_a_share_that_is_not_known_is_a_dash() -> None:
    assert (share(None), share(0.256)) == ("–", "26 %")
