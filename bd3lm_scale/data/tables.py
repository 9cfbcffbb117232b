"""Parquet files and Arrow's two formats: the text column, row by row."""

import io
from collections.abc import Iterator

from bd3lm_scale.data.compressed import DamagedFileError
from bd3lm_scale.data.records import BadRecordError, Options, Record
from bd3lm_scale.data.storage import TransferError

_ROWS = 1000
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def table_records(source: io.RawIOBase | io.BytesIO, options: Options, is_parquet: bool) -> Iterator[Record]:
    """One record per row.

    Args:
        source: the file; seekable.
        options: names the column.
        is_parquet: else Arrow, as a file or a stream.

    Raises:
        DamagedFileError: damaged, or without a text column.
    """
    import pyarrow as pa

    try:
        schema, columns = _parquet(source, options) if is_parquet else _arrow(source)
        if schema.names.count(options.field) != 1:
            raise DamagedFileError(
                f"no column {options.field!r}, or several; name one of {', '.join(schema.names)} with --field"
            )
        row = 0
        for column in columns(schema.get_field_index(options.field)):
            for value in _as_bytes(column, options.field):
                row += 1
                problem = BadRecordError("null", f"column {options.field!r} is null") if value is None else None
                yield Record(value or b"", where=f"row {row}", problem=problem)
    except TransferError:
        raise
    except (pa.ArrowException, OSError) as problem:
        raise DamagedFileError(f"damaged or cut off ({str(problem).splitlines()[0]})") from problem


def _parquet(source, options: Options):
    import pyarrow.parquet

    # pages that carry a checksum are checked
    file = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)

    def columns(_: int):
        for batch in file.iter_batches(batch_size=_ROWS, columns=[options.field]):
            yield batch.column(batch.schema.get_field_index(options.field))

    return file.schema_arrow, columns


def _arrow(source):
    """A file has its index at the end; a stream is complete when its closing mark is there."""
    import pyarrow as pa

    head = source.read(len(_FILE_MAGIC))
    if head == _FILE_MAGIC:
        file = pa.ipc.open_file(source)
        return file.schema, lambda number: (file.get_batch(i).column(number) for i in range(file.num_record_batches))
    size = source.seek(0, io.SEEK_END)
    source.seek(max(0, size - len(_STREAM_END)))
    end = source.read(len(_STREAM_END))
    source.seek(0)
    # streams of before Arrow 0.15 begin and end without the four bytes of ones
    if not (end == _STREAM_END or (not head.startswith(_STREAM_END[:4]) and end.endswith(_STREAM_END[4:]))):
        raise DamagedFileError("damaged or cut off (the mark that ends an Arrow stream is missing)")
    stream = pa.ipc.open_stream(source)
    return stream.schema, lambda number: (batch.column(number) for batch in stream)


def _as_bytes(column, field: str) -> Iterator[bytes | None]:
    """The texts as they are stored, valid UTF-8 or not."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        if not pa.types.is_null(kind):
            raise DamagedFileError(f"column {field!r} is not text but {kind}; name another with --field")
        return iter([None] * len(column))
    binary = {True: pa.large_binary(), False: pa.binary()}[pa.types.is_large_string(kind)]
    if pa.types.is_string_view(kind):
        column = column.cast(pa.string())
    return (value.as_py() for value in column.cast(binary))
