-- One row is one order event: what happened to an order, what its user is told about it, and how far the telling got.
-- id, user_id, order_id, status, message and created_date are the columns that reports already read.
CREATE TABLE notifications.message (
    id               BIGINT GENERATED ALWAYS AS IDENTITY,
    user_id          BIGINT      NOT NULL,
    order_id         BIGINT      NOT NULL,
    -- place of the event within its order, from 1; 0 = the event carried none, as those of older publishers do.
    -- A number, not NULL: pages of the history compare rows, and a NULL in such a comparison loses rows.
    sequence         INTEGER     NOT NULL,
    status           TEXT        NOT NULL,
    -- what the user is told: the event's own text, else one composed from the status
    message          TEXT        NOT NULL,
    -- when it happened: the event's own time, else Kafka's; the history is ordered and cut into days by it
    created_at       TIMESTAMPTZ NOT NULL,
    -- the day in UTC, generated, so that it cannot disagree with created_at
    created_date     DATE        NOT NULL GENERATED ALWAYS AS ((created_at AT TIME ZONE 'UTC')::date) STORED,
    -- when this row was written, by this database's clock; the age of an untold message counts from here, because
    -- an event's own time may be days ago when a topic is read from its start
    saved_at         TIMESTAMPTZ NOT NULL DEFAULT now(),
    -- where the event was read
    source_topic     TEXT        NOT NULL,
    source_partition INTEGER     NOT NULL,
    source_offset    BIGINT      NOT NULL,
    -- W3C trace context of the event's producer; the sending is linked to it
    traceparent      TEXT,
    -- the telling: told_at and given_up_at are the two ends, at most one of them is reached
    told_at          TIMESTAMPTZ,
    attempts         INTEGER     NOT NULL DEFAULT 0,
    next_attempt_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
    last_error       TEXT,
    given_up_at      TIMESTAMPTZ,
    give_up_reason   TEXT,

    CONSTRAINT message_pk PRIMARY KEY (id),
    CONSTRAINT message_user_id_positive CHECK (user_id > 0),
    CONSTRAINT message_order_id_positive CHECK (order_id > 0),
    CONSTRAINT message_sequence_not_negative CHECK (sequence >= 0),
    CONSTRAINT message_status_known CHECK (status IN ('new', 'awaiting payment', 'failed', 'payed', 'cancelled')),
    CONSTRAINT message_attempts_not_negative CHECK (attempts >= 0),
    CONSTRAINT message_one_end CHECK (told_at IS NULL OR given_up_at IS NULL),
    CONSTRAINT message_give_up_has_reason CHECK ((given_up_at IS NULL) = (give_up_reason IS NULL))
);

-- What makes the consumer idempotent: an event delivered again, by a replayed topic or an outbox that sent it twice,
-- meets its own row. Partial, because every event without a sequence has the same 0.
CREATE UNIQUE INDEX message_order_sequence_unique ON notifications.message (order_id, sequence) WHERE sequence > 0;

-- The same for events without a sequence: only their place in Kafka tells two of them apart.
CREATE UNIQUE INDEX message_source_unique ON notifications.message (source_topic, source_partition, source_offset)
    WHERE sequence = 0;

-- GetHistoryWithPeriod reads exactly this, in this order; id is last so that a page token is never ambiguous.
CREATE INDEX message_history ON notifications.message (user_id, created_at, order_id, sequence, id);

-- The sender's queue. Both cover untold rows only, so they stay small however long the history grows:
-- the first finds what is due, the second an order's lowest untold event.
CREATE INDEX message_due ON notifications.message (next_attempt_at, id)
    WHERE told_at IS NULL AND given_up_at IS NULL;
CREATE INDEX message_untold_by_order ON notifications.message (order_id, sequence, id)
    WHERE told_at IS NULL AND given_up_at IS NULL;
