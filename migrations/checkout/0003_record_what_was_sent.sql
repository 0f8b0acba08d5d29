-- Beside a LOMS that ignores keys an order is sent once: what was sent is written down before.
ALTER TABLE checkout.purchase
    -- CreateOrder may have been sent since. NULL: it was not. The default below is for the release before, which does not say.
    ADD COLUMN sent_at TIMESTAMPTZ,
    -- It was sent to a LOMS that ignores keys, and must not be sent again.
    ADD COLUMN sent_keyless BOOLEAN NOT NULL DEFAULT false,
    -- CancelOrder may have been sent since.
    ADD COLUMN cancel_sent_at TIMESTAMPTZ,
    -- Nobody knows whether there is an order, or how it stands. Such a purchase is stored as `refused`, or with an order as
    -- `cancelled`, so that the release before can read it: the lines are back in the cart. The next release may write `unknown`.
    ADD COLUMN outcome_unknown BOOLEAN NOT NULL DEFAULT false,
    -- squawk-ignore ban-drop-constraint
    DROP CONSTRAINT purchase_outcome_known,
    ADD CONSTRAINT purchase_outcome_known
        CHECK (outcome IN ('made', 'failed', 'cancelled', 'refused', 'unknown')) NOT VALID,
    -- An order is written down as soon as LOMS has said its number, while the purchase is open.
    -- squawk-ignore ban-drop-constraint
    DROP CONSTRAINT purchase_outcome_has_order,
    ADD CONSTRAINT purchase_outcome_has_order
        CHECK (outcome IS NULL OR outcome = 'unknown' OR (outcome = 'refused') = (order_id IS NULL)) NOT VALID;

UPDATE checkout.purchase SET sent_at = created_at WHERE closed_at IS NULL;

ALTER TABLE checkout.purchase ALTER COLUMN sent_at SET DEFAULT clock_timestamp();
