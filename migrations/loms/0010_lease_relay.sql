-- The relay's right to send: a row with a time. A transaction kept open while the broker acknowledges (the release before)
-- stands in the way of every ALTER TABLE, and orders queue behind that; a session lock does not survive a transaction pooler.
--
-- Both columns are added without a rewrite: a constant default is kept in the catalogue.
-- The release before does not know them. It holds its advisory lock from reading to deleting; a relay of this release takes
-- the same lock, shared, for the moment in which it reads. So it reads nothing while an old one sends, but an old one may
-- begin while it sends: then both send the same events. What an event's consumers need holds all the same. Each relay sends
-- an order's events in their order, beginning with the first that the outbox still has, and a row leaves the outbox only
-- after the broker has its event, whoever deletes it. So whoever writes an event to the topic for the first time has written
-- those before it, or found them written: first occurrences are in order, repeats may follow. Both delete by id and count
-- what they really deleted: sent + waiting = history.
ALTER TABLE loms.relay
    -- who has the right, named by itself at its start; NULL before the first
    ADD COLUMN holder       UUID,
    -- by this database's clock; whoever finds it in the past may take over
    ADD COLUMN leased_until TIMESTAMPTZ NOT NULL DEFAULT 'epoch';
