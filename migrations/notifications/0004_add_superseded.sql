-- An event without a sequence is known by its order, user and status, wherever it lies: after a broker was rebuilt the same
-- events lie at other offsets, and others at theirs. The same event with a sequence is the same event.
ALTER TABLE notifications.message
    -- false: the one row of its event. true: the same event is in another row that counts; kept, and not told again.
    -- NULL: written by the release before, which does not know this column and tells events without a sequence apart by
    -- their place in Kafka. Its rows must never be refused by the new index (it would not find what they met, and try for
    -- ever), so they are not in it; whoever asks whether an event is known looks at them too.
    -- The constant default is kept in the catalogue for the rows that are there: nothing is rewritten.
    ADD COLUMN superseded BOOLEAN DEFAULT false;
-- squawk-ignore ban-drop-default
ALTER TABLE notifications.message ALTER COLUMN superseded DROP DEFAULT;

-- The place of an event within its order. An event without a sequence has that of its status: an order becomes `new`, then
-- `awaiting payment` or `failed`, then `payed` or `cancelled`.
CREATE FUNCTION notifications.place(sequence INTEGER, status TEXT) RETURNS INTEGER
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE
        WHEN sequence > 0 THEN sequence
        WHEN status = 'new' THEN 1
        WHEN status IN ('awaiting payment', 'failed') THEN 2
        ELSE 3
    END;

-- message_source_unique stays for the release before. A topic that was made anew has other events at known places: then the
-- older row gives its place up (store.rs sets its source_offset below zero).
