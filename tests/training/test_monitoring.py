"""What a run writes down of itself, for spreadsheets and for scripts."""

from __future__ import annotations

import json

from slmsam2_cli.training.monitoring import Log


def test_every_row_is_a_line_of_csv_and_a_json_object(tmp_path):
    log = Log(tmp_path / "log.csv", from_step=0, columns=("step", "total", "prompt"))
    log.add({"step": 1, "total": 0.25})
    log.add({"step": 2, "total": float("nan")})
    log.write()
    assert (tmp_path / "log.csv").read_text() == "step,total,prompt\n1,0.25,\n2,nan,\n"
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "total": 0.25}, {"step": 2, "total": None}]


def test_a_resumed_run_keeps_the_rows_up_to_where_it_stood(tmp_path):
    log = Log(tmp_path / "log.csv", from_step=0, columns=("step", "total"))
    for step in (1, 2, 3):
        log.add({"step": step, "total": step / 4})
    log.write()
    again = Log(tmp_path / "log.csv", from_step=2, columns=("step", "total"))
    assert again.values() == [["1", "0.25"], ["2", "0.5"]]
