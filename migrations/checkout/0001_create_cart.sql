-- The cart keeps the names and columns that reports of the shop already read: cart(id, user_id), cart_item(cart_id, sku, count).

CREATE TABLE checkout.cart (
    id      BIGINT GENERATED ALWAYS AS IDENTITY,
    -- One cart a user: this row is also the lock under which everything about the user's cart and purchases is decided.
    user_id BIGINT NOT NULL,
    CONSTRAINT cart_pkey PRIMARY KEY (id),
    CONSTRAINT cart_user_id_key UNIQUE (user_id),
    CONSTRAINT cart_user_id_positive CHECK (user_id > 0)
);

CREATE TABLE checkout.cart_item (
    cart_id BIGINT NOT NULL,
    -- uint32 on the wire. PostgreSQL has no unsigned types, and INTEGER would lose the upper half of the SKUs.
    sku     BIGINT NOT NULL,
    count   BIGINT NOT NULL,
    -- One line a SKU. The key leads with the cart, because every statement asks for the lines of one cart in the order of SKU.
    CONSTRAINT cart_item_pkey PRIMARY KEY (cart_id, sku),
    -- No ON DELETE: a cart is never deleted, it only gets empty.
    CONSTRAINT cart_item_cart_id_fkey FOREIGN KEY (cart_id) REFERENCES checkout.cart (id),
    CONSTRAINT cart_item_sku_range CHECK (sku BETWEEN 1 AND 4294967295),
    -- A line of no units is no line. The upper bound is the most that LOMS takes in one order; the service refuses before,
    -- this is the last defence.
    CONSTRAINT cart_item_count_range CHECK (count BETWEEN 1 AND 65535)
);
