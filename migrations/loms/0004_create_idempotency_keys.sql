-- A caller's key and the order it made. The hash covers the user and the lines summed by SKU, never wire bytes.
CREATE TABLE loms.idempotency_key (
    user_id    BIGINT      NOT NULL,
    key        TEXT        NOT NULL,
    body_hash  BYTEA       NOT NULL,
    order_id   BIGINT      NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT idempotency_key_pkey PRIMARY KEY (user_id, key),
    CONSTRAINT idempotency_key_printable CHECK (key ~ '^[\x20-\x7e]{1,128}$')
);
-- the sweep after 7 days reads by age; rows arrive in order of time, which is what BRIN is small for
CREATE INDEX idempotency_key_created_at_idx ON loms.idempotency_key USING brin (created_at);
