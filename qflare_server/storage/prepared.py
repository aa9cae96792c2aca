"""Prepared statements: compiled once and run directly on the driver's cursor, for the path of every update.

SQLAlchemy's own execution takes forty microseconds or more per statement, during which other threads may take the GIL.
A batch of updates needs seven statements, so this would dominate. Statements are written and typed as everywhere else,
errors are SQLAlchemy's, and listeners to the engine's cursor events see these statements too.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Final, cast

from sqlalchemy import Column, Connection, Dialect, Select, Table, Text, Update, bindparam, exc
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.schema import ScalarElementColumnDefault
from sqlalchemy.types import TypeDecorator, TypeEngine

Row = tuple[Any, ...]
Processor = Callable[[Any], Any]
TOGETHER: Final = "qflare_together"
MAX_ROWS: Final = 64
"""Most rows of one INSERT."""
EXACT_ROWS: Final = 16
"""Up to here a batch is one statement; a larger one is split into powers of two, so that few distinct statements are
compiled."""


class _Texts(TypeDecorator[list[str]]):
    """A list of texts as one parameter."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: list[str] | None, dialect: Dialect) -> Any:
        return json.dumps(value) if dialect.name == "sqlite" else value


class OneOf(ColumnElement[bool]):
    """Membership of a column in a list of texts that is one parameter, whatever its length.

    Args:
        column: A column of texts.
        name: Name of the parameter.
    """

    inherit_cache = False

    def __init__(self, column: ColumnElement[str], name: str) -> None:
        self.column = column
        self.texts = bindparam(name, type_=_Texts())


@compiles(OneOf, "sqlite")
def _one_of_sqlite(element: OneOf, compiler: SQLCompiler, **options: Any) -> str:
    column, texts = (compiler.process(part, **options) for part in (element.column, element.texts))
    return f"{column} IN (SELECT value FROM json_each({texts}))"  # noqa: S608 - both compiled, nothing quoted


@compiles(OneOf, "postgresql")
def _one_of_postgres(element: OneOf, compiler: SQLCompiler, **options: Any) -> str:
    column, texts = (compiler.process(part, **options) for part in (element.column, element.texts))
    return f"{column} = ANY ({texts})"


class PreparedStatement:
    """A SELECT or UPDATE with named parameters.

    Args:
        statement: The statement; all its values are parameters or constants.
    """

    def __init__(self, statement: Select[Any] | Update) -> None:
        self._statement = statement
        self._compiled = lru_cache(maxsize=2)(self._compile)

    def rows(self, session: Session, parameters: Mapping[str, Any]) -> list[Row]:
        """Run the statement and return its rows, with the Python types of the columns.

        Raises:
            DBAPIError: The statement failed.
        """
        connection = session.connection()
        sql, bind, results = self._compiled(connection.dialect)
        found = cast("list[Row]", _run(connection, sql, bind(parameters), fetch=True))
        if not any(results):
            return found
        return [
            tuple(
                value if process is None else process(value)
                for value, process in zip(row, results, strict=True)
            )
            for row in found
        ]

    def run(self, session: Session, parameters: Mapping[str, Any]) -> None:
        """Run the statement and return nothing.

        Raises:
            DBAPIError: The statement failed.
        """
        connection = session.connection()
        sql, bind, _ = self._compiled(connection.dialect)
        _write(session, connection, sql, bind(parameters))

    def _compile(
        self, dialect: Dialect
    ) -> tuple[str, Callable[[Mapping[str, Any]], Any], list[Processor | None]]:
        compiled = self._statement.compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        constants = dict(compiled.params)
        processors = {name: _bind(bound.type, dialect) for name, bound in compiled.binds.items()}
        order = compiled.positiontup

        def bind(parameters: Mapping[str, Any]) -> Any:
            values = {**constants, **parameters}
            for name, process in processors.items():
                if process is not None:
                    values[name] = process(values[name])
            return values if order is None else [values[name] for name in order]

        columns = getattr(self._statement, "selected_columns", ())
        return str(compiled), bind, [_result(column.type, dialect) for column in columns]


class PreparedInsert:
    """An INSERT of many rows into a table.

    Args:
        table: The table.
        names: Columns that rows may set, NULL where a row does not; all other columns get their default.
    """

    def __init__(self, table: Table, names: Sequence[str]) -> None:
        self._table = table
        self._columns = [table.c[name] for name in names]
        self._names = frozenset(names)
        self._constants = [
            (column, column.default.arg)
            for column in table.c
            if column.name not in names and isinstance(column.default, ScalarElementColumnDefault)
        ]
        self._compiled = lru_cache(maxsize=2 * (EXACT_ROWS + MAX_ROWS.bit_length()))(self._compile)

    def run(self, session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows.

        Raises:
            DBAPIError: The statement failed; IntegrityError if a row exists already.
            KeyError: A row has a column that is not among the names.
        """
        for row in rows:
            if not row.keys() <= self._names:
                raise KeyError(*sorted(row.keys() - self._names))
        connection = session.connection()
        start = 0
        while start < len(rows):
            count = _rows_of_next(len(rows) - start)
            sql, processors = self._compiled(connection.dialect, count)
            part = rows[start : start + count]
            columns = [_column(part, name, process) for name, process in processors]
            values = [value for row in zip(*columns, strict=True) for value in row]
            _write(session, connection, sql, values)
            start += count

    def _compile(
        self, dialect: Dialect, count: int
    ) -> tuple[str, list[tuple[str, Processor | None]]]:
        quote = dialect.identifier_preparer.quote
        mark = "?" if dialect.paramstyle == "qmark" else "%s"
        constants = [_literal(column, value, dialect) for column, value in self._constants]
        names = [column.name for column in (*self._columns, *(item for item, _ in self._constants))]
        row = f"({', '.join([mark] * len(self._columns) + constants)})"
        sql = (
            f"INSERT INTO {quote(self._table.name)} ({', '.join(map(quote, names))})"  # noqa: S608
            f" VALUES {', '.join([row] * count)}"
        )
        return sql, [(column.name, _bind(column.type, dialect)) for column in self._columns]


def _rows_of_next(left: int) -> int:
    """Return how many of the rows that are left the next statement inserts."""
    return left if left <= EXACT_ROWS else min(MAX_ROWS, 1 << left.bit_length() - 1)


def _column(rows: Sequence[Mapping[str, Any]], name: str, process: Processor | None) -> list[Any]:
    """Return the values of a column; one that many rows in turn share, such as their time, is converted once."""
    values = [row.get(name) for row in rows]
    if process is None:
        return values
    last, made = values[0], process(values[0])
    converted = [made]
    for value in values[1:]:
        if value is not last:
            last, made = value, process(value)
        converted.append(made)
    return converted


def _literal(column: Column[Any], value: Any, dialect: Dialect) -> str:
    process = column.type.dialect_impl(dialect).literal_processor(dialect)
    assert process is not None, column
    return process(value)


def _bind(kind: TypeEngine[Any], dialect: Dialect) -> Processor | None:
    return kind.dialect_impl(dialect).bind_processor(dialect)


def _result(kind: TypeEngine[Any], dialect: Dialect) -> Processor | None:
    return kind.dialect_impl(dialect).result_processor(dialect, None)


@contextmanager
def together(session: Session) -> Iterator[None]:
    """Send the writes of a block to PostgreSQL in one round trip, at the end of the block.

    Applies to `PreparedStatement.run` and `PreparedInsert.run`; other statements run at once. Errors of the writes are
    raised at the end of the block.
    """
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        yield
        return
    waiting: list[bytes] = []
    session.info[TOGETHER] = waiting
    try:
        yield
    finally:
        del session.info[TOGETHER]
    if waiting:
        _run(connection, b";\n".join(waiting), None, fetch=False)


def _write(session: Session, connection: Connection, sql: str, values: Any) -> None:
    waiting = session.info.get(TOGETHER)
    if waiting is None:
        _run(connection, sql, values, fetch=False)
        return
    cursor: Any = connection.connection.cursor()
    waiting.append(cursor.mogrify(sql, values))
    cursor.close()


def _run(connection: Connection, sql: str | bytes, values: Any, *, fetch: bool) -> list[Any]:
    cursor = connection.connection.cursor()
    events = connection.engine.dispatch
    context = SimpleNamespace() if events.before_cursor_execute else None
    try:
        if context is not None:
            events.before_cursor_execute(connection, cursor, sql, values, context, False)
        cursor.execute(cast("str", sql), values)
        if context is not None:
            events.after_cursor_execute(connection, cursor, sql, values, context, False)
        return list(cursor.fetchall()) if fetch else []
    except Exception as error:
        text = sql if isinstance(sql, str) else "batched writes"
        raise sqlalchemy_error(connection.dialect, text, error) from error
    finally:
        cursor.close()


def sqlalchemy_error(dialect: Dialect, sql: str, error: Exception) -> BaseException:
    """Return the SQLAlchemy exception for an exception of the driver, without parameter values."""
    base = dialect.loaded_dbapi.Error
    if not isinstance(error, base):
        return error
    return exc.DBAPIError.instance(sql, None, error, base, hide_parameters=True, dialect=dialect)
