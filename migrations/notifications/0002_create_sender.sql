-- The right to send, held by one replica at a time: a row with a time, because session locks do not survive a
-- transaction pooler and a lock held across calls to Telegram would be a transaction held across the network.
CREATE TABLE notifications.sender (
    only_row     BOOLEAN     NOT NULL DEFAULT true,
    -- the replica that sends, named by itself at start; NULL before the first
    holder       UUID,
    -- by this database's clock; whoever finds it in the past may take over
    leased_until TIMESTAMPTZ NOT NULL DEFAULT 'epoch',
    -- Telegram asked everyone to wait until then (429); kept here so that a replica that takes over waits too
    paused_until TIMESTAMPTZ NOT NULL DEFAULT 'epoch',

    CONSTRAINT sender_pk PRIMARY KEY (only_row),
    CONSTRAINT sender_single_row CHECK (only_row)
);

-- taking the lease is then an UPDATE, which two replicas cannot both win
INSERT INTO notifications.sender DEFAULT VALUES;
