-- One row per registered device of the host. `json` is devices/record.rs.
CREATE TABLE devices (
    id TEXT PRIMARY KEY NOT NULL,
    name TEXT UNIQUE NOT NULL,
    address TEXT UNIQUE NOT NULL,
    json TEXT NOT NULL
) STRICT;

-- Who has which device: one at a time, running or not. A device that somebody has cannot go.
CREATE TABLE device_claims (
    device_id TEXT PRIMARY KEY NOT NULL REFERENCES devices (id),
    instance_id TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE
) STRICT;

-- What was changed of the host for a machine, and is to be undone: written before the change.
-- Nothing here goes with the record of an instance; a boot of the host undoes everything.
CREATE TABLE loans (
    name TEXT PRIMARY KEY NOT NULL,
    loan TEXT NOT NULL,
    instance_id TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    json TEXT NOT NULL
) STRICT;
