"""Results of processes of the pool: as they were after a file, whatever is in them."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qflare.v1 import security_pb2
from qflare_simulation.results import Raised, Result, read, write
from qflare_simulation.worker import Failed, Left, Trained

TEXT = st.text(st.characters(), max_size=40)
BYTES = st.binary(max_size=100)
STATEMENTS = st.builds(
    security_pb2.EvaluationStatement,
    realm=st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    example_count=st.integers(0, 2**40),
)
ITEMS = st.one_of(
    BYTES,
    st.dictionaries(TEXT.filter(lambda text: text.isascii()), st.floats(allow_nan=False)),
    st.builds(Trained, BYTES, BYTES, st.lists(BYTES), TEXT),
    st.builds(Failed, TEXT, TEXT),
    st.builds(Left, TEXT),
    STATEMENTS,
    st.builds(Raised, TEXT, TEXT),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ITEMS | st.lists(ITEMS))
def test_a_result_is_the_same_after_a_file(tmp_path: Path, result: Result) -> None:
    path = tmp_path / "result"
    path.unlink(missing_ok=True)
    write(path, result)

    found = read(path)
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize("result", [1, "text", None, [b"", 1], {1, 2}, object()])
def test_other_results_are_refused(tmp_path: Path, result: object) -> None:
    with pytest.raises(TypeError, match="a process of the pool cannot return"):
        write(tmp_path / "result", result)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
