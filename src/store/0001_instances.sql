-- One row per instance. `json` is instances/record.rs; what has to be unique or found is a column.
CREATE TABLE instances (
    id TEXT PRIMARY KEY NOT NULL,
    name TEXT UNIQUE NOT NULL,
    json TEXT NOT NULL
) STRICT;
