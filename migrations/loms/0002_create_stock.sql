-- Stock by warehouse. Per SKU and warehouse: on sale + reserved + written off = received.

-- Units on sale. The key begins with the SKU because orders lock rows by (sku, warehouse_id); the low fill factor keeps
-- the many updates of a popular row on its page.
CREATE TABLE loms.stock (
    warehouse_id BIGINT NOT NULL,
    sku          BIGINT NOT NULL,
    count        BIGINT NOT NULL,
    CONSTRAINT stock_pkey PRIMARY KEY (sku, warehouse_id),
    CONSTRAINT stock_warehouse_id_positive CHECK (warehouse_id > 0),
    CONSTRAINT stock_sku_range CHECK (sku BETWEEN 1 AND 4294967295),
    -- the last defence against overselling, not the first: allocation decides under the row's lock
    CONSTRAINT stock_count_not_negative CHECK (count >= 0)
) WITH (fillfactor = 50);

-- Units held for orders that await payment.
CREATE TABLE loms.reservation_stock (
    order_id     BIGINT NOT NULL,
    warehouse_id BIGINT NOT NULL,
    sku          BIGINT NOT NULL,
    count        BIGINT NOT NULL,
    CONSTRAINT reservation_stock_pkey PRIMARY KEY (order_id, sku, warehouse_id),
    CONSTRAINT reservation_stock_count_positive CHECK (count > 0)
);

-- Units sold, append-only: payment moves reservations here.
CREATE TABLE loms.write_off (
    order_id     BIGINT      NOT NULL,
    warehouse_id BIGINT      NOT NULL,
    sku          BIGINT      NOT NULL,
    count        BIGINT      NOT NULL,
    at           TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT write_off_pkey PRIMARY KEY (order_id, sku, warehouse_id),
    CONSTRAINT write_off_count_positive CHECK (count > 0)
);

-- Deliveries are kept whole, so that what was received can be recounted; the hash tells a repeated delivery from
-- another one under the same id.
CREATE TABLE loms.delivery (
    id           TEXT        NOT NULL,
    content_hash BYTEA       NOT NULL,
    received_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
    CONSTRAINT delivery_pkey PRIMARY KEY (id),
    CONSTRAINT delivery_id_printable CHECK (id ~ '^[\x20-\x7e]{1,128}$')
);

CREATE TABLE loms.delivery_line (
    delivery_id  TEXT   NOT NULL,
    warehouse_id BIGINT NOT NULL,
    sku          BIGINT NOT NULL,
    count        BIGINT NOT NULL,
    CONSTRAINT delivery_line_pkey PRIMARY KEY (delivery_id, sku, warehouse_id),
    CONSTRAINT delivery_line_delivery_fkey FOREIGN KEY (delivery_id) REFERENCES loms.delivery (id),
    CONSTRAINT delivery_line_count_positive CHECK (count > 0)
);
