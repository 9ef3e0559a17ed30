-- One row per volume. `json` is volumes/record.rs; what is found by is a column.
CREATE TABLE volumes (
    id TEXT PRIMARY KEY NOT NULL,
    name TEXT NOT NULL,
    json TEXT NOT NULL
) STRICT;

CREATE INDEX volumes_by_name ON volumes (name);

-- Who has which volume. A volume that somebody has cannot go; an instance that goes has none.
CREATE TABLE attachments (
    volume_id TEXT NOT NULL REFERENCES volumes (id),
    instance_id TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    mount_path TEXT NOT NULL,
    read_only INTEGER NOT NULL,
    PRIMARY KEY (volume_id, instance_id)
) STRICT;

CREATE INDEX attachments_by_instance ON attachments (instance_id);
