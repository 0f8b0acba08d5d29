-- Events that wait for the broker. A row is written by the transaction that changes the order and deleted by the relay
-- once the broker has it; the payload is made from status_change when it is sent.

-- CACHE 1, drawn by the INSERT after the order is locked: within an order, ids follow sequences. The relay sends by id.
CREATE SEQUENCE loms.outbox_id_seq AS BIGINT CACHE 1;

CREATE TABLE loms.outbox (
    id          BIGINT  NOT NULL DEFAULT nextval('loms.outbox_id_seq'),
    order_id    BIGINT  NOT NULL,
    sequence    INTEGER NOT NULL,
    -- W3C trace context of the call that caused the event
    traceparent TEXT,
    created_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT outbox_pkey PRIMARY KEY (id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
ALTER SEQUENCE loms.outbox_id_seq OWNED BY loms.outbox.id;

-- One row: how many events the relay has sent, counted in the transaction that deletes them. The audit holds it against
-- the history.
CREATE TABLE loms.relay (
    only_row BOOLEAN NOT NULL DEFAULT TRUE,
    sent     BIGINT  NOT NULL DEFAULT 0,
    CONSTRAINT relay_pkey PRIMARY KEY (only_row),
    CONSTRAINT relay_only_row CHECK (only_row)
);
INSERT INTO loms.relay DEFAULT VALUES;
