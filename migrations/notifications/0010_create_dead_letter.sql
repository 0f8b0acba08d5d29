-- A record that cannot be saved as an event, as it came. It is here before its offset is committed; from here a worker takes
-- it to the dead-letter topic. So a topic that is missing, or a broker that is away, keeps no partition waiting.
CREATE TABLE notifications.dead_letter (
    id             BIGINT GENERATED ALWAYS AS IDENTITY,
    -- where it was read. With the time and the value, because a topic that was made anew, in the same cluster, has other
    -- records at the same offsets
    cluster_id     TEXT        NOT NULL,
    topic          TEXT        NOT NULL,
    partition      INTEGER     NOT NULL,
    "offset"       BIGINT      NOT NULL,
    -- Kafka's time, milliseconds since 1970; -1: it has none. A number: whoever wrote it may have meant any
    record_millis  BIGINT      NOT NULL,
    value_sha256   BYTEA       NOT NULL,
    key            BYTEA,
    value          BYTEA,
    -- names and values, each after its length: see letter/headers.rs
    headers        BYTEA       NOT NULL,
    -- of the three together; what waits to be moved has a bound
    bytes          BIGINT      NOT NULL,
    cause          TEXT        NOT NULL,
    error          TEXT        NOT NULL,
    dead_at        TIMESTAMPTZ NOT NULL DEFAULT now(),
    -- a replica is on its way to the topic with it; another tries after that
    claimed_until  TIMESTAMPTZ NOT NULL DEFAULT 'epoch',
    -- the topic has it, or needs it no more; the row goes 7 days later
    moved_at       TIMESTAMPTZ,
    -- a `dead-letters replay` is about to put it back; another may after that
    put_back_until TIMESTAMPTZ NOT NULL DEFAULT 'epoch',
    put_back_at    TIMESTAMPTZ,

    CONSTRAINT dead_letter_pk PRIMARY KEY (id),
    CONSTRAINT dead_letter_record_unique UNIQUE (cluster_id, topic, partition, "offset", record_millis, value_sha256),
    CONSTRAINT dead_letter_sha256_length CHECK (length(value_sha256) = 32),
    CONSTRAINT dead_letter_bytes_not_negative CHECK (bytes >= 0)
);

-- What waits to be moved, and how much that is.
CREATE INDEX dead_letter_unmoved ON notifications.dead_letter (id) INCLUDE (bytes) WHERE moved_at IS NULL;
-- What waits to be put back.
CREATE INDEX dead_letter_waiting ON notifications.dead_letter (id) WHERE put_back_at IS NULL;
-- What may go.
CREATE INDEX dead_letter_moved ON notifications.dead_letter (moved_at) WHERE moved_at IS NOT NULL;
