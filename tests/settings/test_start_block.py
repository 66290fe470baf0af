"""The block before the first step: at most eight lines, and what is on in each of them."""

import dataclasses

from mindspeed_cp.settings.start_block import WIDTH, Start, start_block

START = Start(
    "Ring, cp=4, zigzag, causal", {"tp": 2, "pp": 1, "cp": 4, "dp": 1}, 4099, (1024, 1025), "zigzag", "npu",
    "the ring's own way", "kept apart", (48, 48),
)  # fmt: skip


def test_the_block_says_what_is_on_in_at_most_eight_lines():
    lines = start_block(START).splitlines()
    assert len(lines) == 8 and lines[0].startswith("+-- context parallelism ")
    assert lines[1:6] == [
        "| on      Ring, cp=4, zigzag, causal",
        "| sizes   tp 2 x pp 1 x cp 4 x dp 1",
        "| tokens  4,099 of a sequence, 1,024 to 1,025 on a rank, zigzag; documents kept apart",
        "| kernel  npu; the ring's own way",
        "| patches all 48 alive",
    ]
    assert "--cp-log says" in lines[6] and "in the lines of --cp-log" in start_block(START, has_log=True)


def test_a_patch_that_is_gone_is_said_and_no_line_is_too_long():
    text = start_block(dataclasses.replace(START, patches=(47, 48), setting="x" * 200))
    assert "47 of 48 alive: somebody replaced the others" in text
    assert max(map(len, text.splitlines())) == WIDTH and text.isascii()
