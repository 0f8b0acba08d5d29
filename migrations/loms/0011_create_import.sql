-- What `loms import` has taken over from the system before, whose tables are in `public` of this database or of another.
CREATE TABLE loms.import (
    only_row   BOOLEAN     NOT NULL DEFAULT TRUE,
    -- `running` from the first slice to the last: the service does not serve; `declined`: the tables are left where they are
    state      TEXT        NOT NULL,
    -- the database that is read, and what it held before the first slice: rows, highest ids and a sum over all columns
    source     TEXT        NOT NULL DEFAULT '',
    figures    TEXT        NOT NULL DEFAULT '',
    -- the highest order whose slice is committed
    through    BIGINT,
    changed_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT import_pkey PRIMARY KEY (only_row),
    CONSTRAINT import_only_row CHECK (only_row),
    CONSTRAINT import_state_known CHECK (state IN ('running', 'done', 'declined'))
);

-- Units that a row of stock was below 0: the system before had sold them and had not got them.
CREATE TABLE loms.import_deficit (
    warehouse_id BIGINT NOT NULL,
    sku          BIGINT NOT NULL,
    units        BIGINT NOT NULL,
    CONSTRAINT import_deficit_pkey PRIMARY KEY (sku, warehouse_id),
    CONSTRAINT import_deficit_units_positive CHECK (units > 0)
);

-- Steps that were taken over are the import's; when they happened the system before did not write down: NULL. Only the import
-- writes NULL, and a release that does not know it refuses to list such an order, and to send such an event, until a later one
-- is back: after an import there is no way back to a release before it.
-- The new check lets in what the old one let in: NOT VALID, nothing is read again.
ALTER TABLE loms.status_change
    -- squawk-ignore ban-drop-constraint
    DROP CONSTRAINT status_change_actor_known,
    ADD CONSTRAINT status_change_actor_known CHECK (actor IN ('user', 'timeout', 'import')) NOT VALID,
    -- squawk-ignore ban-drop-not-null
    ALTER COLUMN at DROP NOT NULL;
-- squawk-ignore ban-drop-not-null
ALTER TABLE loms.user_order ALTER COLUMN created_at DROP NOT NULL;
-- squawk-ignore ban-drop-not-null
ALTER TABLE loms.write_off ALTER COLUMN at DROP NOT NULL;

-- The system before had no bound on the units of a line but the message's own, uint32.
ALTER TABLE loms.order_item
    -- squawk-ignore ban-drop-constraint
    DROP CONSTRAINT order_item_count_range,
    ADD CONSTRAINT order_item_count_range CHECK (count BETWEEN 1 AND 4294967295) NOT VALID;
