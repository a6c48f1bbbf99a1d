"""What the columns of a Parquet file hold: which has the turns, how many letters and pictures its
rows have. No picture is read."""
import re

import numpy as np
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from storage.formats import (
    COLUMNS, MARK, as_list, format_of, refuse_misnamed, roles_and_texts, turns_of)


def column_of_turns(file, schema):
    """The one of FORMATS that a Parquet file has. Raises ValueError, also where its column of
    pictures cannot hold any."""
    columns = {field.name: str(field.type) for field in schema if str(field.type) != "null"}
    try:
        key = format_of(columns)
        if not columns.keys() & {"image", "images"} and "image" not in columns[key]:
            refuse_misnamed(columns)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from None
    if not re.search("(value|content|user): ", columns[key]):
        raise ValueError(f"{file} has no turns in its column {key}, which is {columns[key]}")
    for name in ("image", "images"):
        if not re.search("binary|string|null", columns.get(name, "null")):
            raise ValueError(f"{file} has no pictures in its column {name}, which is "
                             f"{columns[name]}: store their bytes or paths")
    return key


def metadata_of(file):
    """The metadata of a Parquet file. Raises ValueError for what is none."""
    try:
        return parquet.read_metadata(file)
    except Exception as error:
        raise ValueError(f"{file} is no complete parquet file ({error}): download it again"
                         ) from error


def read_group(path, group):
    """A row group of a Parquet file as a table of those of COLUMNS that it has. Raises ValueError
    where its bytes are damaged."""
    try:
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=list(COLUMNS))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged in row group {group} ({error}): download it again"
                         ) from error


def batches_of(path, name):
    """Yields a column of a Parquet file, some thousand rows at a time. Raises as `read_group`."""
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[name]):
                yield batch.column(0)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged in its column {name} ({error}): download it again"
                         ) from error


def picture_leaves(group):
    """The metadata of the columns of a row group that belong to its pictures."""
    leaves = map(group.column, range(group.num_columns))
    return [leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] in ("image", "images")]


def has_pictures(group):
    """Whether a row group may have a picture, from its metadata."""
    return any(leaf.statistics is None or leaf.statistics.null_count < leaf.num_values
               for leaf in picture_leaves(group))


def picture_counts(path):
    """(rows,) int64: pictures of every row of a Parquet file, counted by the paths beside their
    bytes; one each where there are no paths."""
    with parquet.ParquetFile(path) as file:
        rows = file.metadata.num_rows
        leaves = [leaf.path_in_schema for leaf in picture_leaves(file.metadata.row_group(0))] \
            if rows else []
        paths = [leaf for leaf in leaves if leaf.endswith(".path")]
        if not paths:
            return np.ones(rows, np.int64)
        batches = file.iter_batches(columns=paths)
        lists = [as_list(row) for batch in batches for row in batch.column(0).to_pylist()]
    return np.array([len(each) - each.count(None) for each in lists], np.int64)


def text_sizes(key, column):
    """A column of turns in format `key` -> (rows, 2) int64: characters of all turns, marks."""
    name = re.search("(value|content): (large_)?string", str(column.type))
    if name:  # turns without parts
        row = compute.list_parent_indices(column)                                    # (turns,)
        text = compute.struct_field(column.flatten(), name[1]).fill_null("")         # (turns,)
        counts = compute.utf8_length(text), compute.count_substring(text, MARK)      # (turns,) each
        sums = [np.bincount(row, count, len(column)) for count in counts]            # (rows,) each
        return np.stack(sums, 1).astype(int)
    sizes = []
    for given in column.to_pylist():
        try:
            pairs = roles_and_texts(turns_of({key: given}, key)[0])
        except ValueError:  # reading the record will say why
            pairs = []
        text = "".join(text for _, text in pairs if isinstance(text, str))
        sizes.append((len(text), text.count(MARK)))
    return np.array(sizes, np.int64).reshape(-1, 2)
