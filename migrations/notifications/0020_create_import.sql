-- What `notifications import` has taken over from the system before, whose table is in `public` of this database or of another.
CREATE TABLE notifications.import (
    only_row   BOOLEAN     NOT NULL DEFAULT TRUE,
    -- `running` from the first slice to the last: the service does not serve; `declined`: the table is left where it is
    state      TEXT        NOT NULL,
    -- the database that is read, and what it held before the first slice: rows, highest ids and a sum over all columns
    source     TEXT        NOT NULL DEFAULT '',
    figures    TEXT        NOT NULL DEFAULT '',
    -- the highest message whose slice is committed
    through    BIGINT,
    changed_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT import_pkey PRIMARY KEY (only_row),
    CONSTRAINT import_only_row CHECK (only_row),
    CONSTRAINT import_state_known CHECK (state IN ('running', 'done', 'declined'))
);
