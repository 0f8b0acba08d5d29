-- A purchase is written down before LOMS is asked, so that whoever comes next (a retry, another call, the worker) can
-- finish what a crash or a lost answer left open, and ends with exactly one order.

CREATE TABLE checkout.purchase (
    -- The idempotency key for LOMS. Random, so that no other purchase, user or restored backup can ever draw it again.
    id              UUID NOT NULL DEFAULT gen_random_uuid(),
    -- The user is the cart's: said once, so that the two cannot differ.
    cart_id         BIGINT NOT NULL,
    -- The client's key, if it gave one. The request has no field but user and key, so there is no body to hash beside it.
    idempotency_key TEXT,
    -- clock_timestamp(), not now(): now() is the begin of a transaction that may have waited for the cart's lock, and the
    -- order of a user's purchases is read from this column.
    created_at      TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    -- When the worker takes it over. Set and compared with this database's clock only.
    next_attempt_at TIMESTAMPTZ NOT NULL,
    attempts        INTEGER NOT NULL DEFAULT 0,
    -- Once true, the order may be cancelled at any moment, so an answer that was asked for before does not count any more.
    resolving       BOOLEAN NOT NULL DEFAULT false,
    closed_at       TIMESTAMPTZ,
    -- Text and a CHECK instead of an enum type: another outcome is then one constraint to change, in a transaction.
    outcome         TEXT,
    order_id        BIGINT,
    -- What LOMS lacked, when the order failed: read and written as a whole, never searched.
    shortages       JSONB NOT NULL DEFAULT '[]',
    -- Why LOMS would not even take the order.
    refusal         TEXT,
    -- Whether a caller was there to hear the outcome. If not, the user's next Purchase of an empty cart is told it.
    told            BOOLEAN NOT NULL DEFAULT false,
    CONSTRAINT purchase_pkey PRIMARY KEY (id),
    CONSTRAINT purchase_cart_id_fkey FOREIGN KEY (cart_id) REFERENCES checkout.cart (id),
    CONSTRAINT purchase_idempotency_key_length CHECK (length(idempotency_key) BETWEEN 1 AND 128),
    CONSTRAINT purchase_attempts_not_negative CHECK (attempts >= 0),
    CONSTRAINT purchase_outcome_known CHECK (outcome IN ('made', 'failed', 'cancelled', 'refused')),
    -- Closed means having an outcome, and every outcome but a refusal has its order.
    CONSTRAINT purchase_closed_has_outcome CHECK ((closed_at IS NULL) = (outcome IS NULL)),
    CONSTRAINT purchase_outcome_has_order CHECK ((outcome IS NULL OR outcome = 'refused') = (order_id IS NULL)),
    CONSTRAINT purchase_told_is_closed CHECK (NOT told OR closed_at IS NOT NULL)
);

-- At most one open purchase a user: whatever the code does, a double click cannot become two orders.
CREATE UNIQUE INDEX purchase_open_key ON checkout.purchase (cart_id) WHERE closed_at IS NULL;

-- A key is unique per user as long as its purchase is kept.
CREATE UNIQUE INDEX purchase_idempotency_key ON checkout.purchase (cart_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- The user's last purchase.
CREATE INDEX purchase_cart_id_created_at_idx ON checkout.purchase (cart_id, created_at);

-- What the worker looks for; holds open purchases alone, so it stays as small as the trouble is.
CREATE INDEX purchase_next_attempt_at_idx ON checkout.purchase (next_attempt_at) WHERE closed_at IS NULL;

-- What the sweep looks for.
CREATE INDEX purchase_closed_at_idx ON checkout.purchase (closed_at) WHERE closed_at IS NOT NULL;

-- The lines that were taken out of the cart: they are in one of the two tables, never in both, so that what the user
-- adds meanwhile cannot be ordered twice or lost.
CREATE TABLE checkout.purchase_item (
    purchase_id UUID NOT NULL,
    sku         BIGINT NOT NULL,
    count       BIGINT NOT NULL,
    CONSTRAINT purchase_item_pkey PRIMARY KEY (purchase_id, sku),
    -- The sweep deletes a purchase, its lines go with it.
    CONSTRAINT purchase_item_purchase_id_fkey FOREIGN KEY (purchase_id) REFERENCES checkout.purchase (id) ON DELETE CASCADE,
    CONSTRAINT purchase_item_sku_range CHECK (sku BETWEEN 1 AND 4294967295),
    CONSTRAINT purchase_item_count_range CHECK (count BETWEEN 1 AND 65535)
);
