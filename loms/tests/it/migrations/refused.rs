//! What each constraint is there for.

/// Statements that are refused, by the constraint that refuses them, in a database at work.
pub(super) const REFUSED: [(&str, &[&str]); 34] = [
    (
        "user_order_pkey",
        &["INSERT INTO loms.user_order (id, user_id, status) VALUES (1, 1, 'new')"],
    ),
    (
        "user_order_user_id_positive",
        &[
            "INSERT INTO loms.user_order (user_id, status) VALUES (0, 'new')",
            "UPDATE loms.user_order SET user_id = -user_id",
        ],
    ),
    (
        "order_item_pkey",
        &["INSERT INTO loms.order_item VALUES (1, 7, 1)"],
    ),
    (
        "order_item_sku_range",
        &[
            "INSERT INTO loms.order_item VALUES (1, 0, 1)",
            "INSERT INTO loms.order_item VALUES (1, 4294967296, 1)",
        ],
    ),
    (
        "order_item_count_range",
        &[
            "INSERT INTO loms.order_item VALUES (2, 7, 0)",
            "INSERT INTO loms.order_item VALUES (2, 7, 4294967296)",
            "UPDATE loms.order_item SET count = -count",
        ],
    ),
    (
        "order_shortage_pkey",
        &["INSERT INTO loms.order_shortage VALUES (2, 9, 5, 1)"],
    ),
    (
        "order_shortage_is_short",
        &[
            "INSERT INTO loms.order_shortage VALUES (2, 7, 5, 5)",
            "INSERT INTO loms.order_shortage VALUES (2, 7, 5, -1)",
        ],
    ),
    (
        "unpaid_order_pkey",
        &["INSERT INTO loms.unpaid_order VALUES (1, now())"],
    ),
    (
        "status_change_pkey",
        &["INSERT INTO loms.status_change VALUES (1, 2, 'new', 'failed', 'user')"],
    ),
    (
        "status_change_legal",
        &[
            "INSERT INTO loms.status_change VALUES (9, 0, NULL, 'new', 'user')",
            "INSERT INTO loms.status_change VALUES (9, 1, NULL, 'payed', 'user')",
            "INSERT INTO loms.status_change VALUES (9, 1, 'new', 'new', 'user')",
            "INSERT INTO loms.status_change VALUES (9, 2, 'new', 'payed', 'user')",
            "INSERT INTO loms.status_change VALUES (9, 2, NULL, 'failed', 'user')",
            "INSERT INTO loms.status_change VALUES (9, 3, 'failed', 'cancelled', 'user')",
            "INSERT INTO loms.status_change VALUES (9, 3, 'awaiting payment', 'failed', 'user')",
            "INSERT INTO loms.status_change VALUES (9, 3, NULL, 'payed', 'user')",
            "INSERT INTO loms.status_change VALUES (9, 4, 'payed', 'cancelled', 'user')",
            "UPDATE loms.status_change SET to_status = 'new' WHERE sequence = 3",
        ],
    ),
    (
        "status_change_actor_known",
        &["INSERT INTO loms.status_change VALUES (9, 1, NULL, 'new', 'somebody')"],
    ),
    ("stock_pkey", &["INSERT INTO loms.stock VALUES (1, 7, 1)"]),
    (
        "stock_warehouse_id_positive",
        &["INSERT INTO loms.stock VALUES (0, 7, 1)"],
    ),
    (
        "stock_sku_range",
        &[
            "INSERT INTO loms.stock VALUES (1, 0, 1)",
            "INSERT INTO loms.stock VALUES (1, 4294967296, 1)",
        ],
    ),
    (
        "stock_count_not_negative",
        &["UPDATE loms.stock SET count = count - 3"],
    ),
    (
        "reservation_stock_pkey",
        &["INSERT INTO loms.reservation_stock VALUES (1, 1, 7, 1)"],
    ),
    (
        "reservation_stock_count_positive",
        &[
            "INSERT INTO loms.reservation_stock VALUES (1, 2, 7, 0)",
            "UPDATE loms.reservation_stock SET count = count - 2",
        ],
    ),
    (
        "write_off_pkey",
        &["INSERT INTO loms.write_off VALUES (3, 2, 7, 1)"],
    ),
    (
        "write_off_count_positive",
        &["INSERT INTO loms.write_off VALUES (3, 1, 7, 0)"],
    ),
    (
        "delivery_pkey",
        &["INSERT INTO loms.delivery VALUES ('march', '')"],
    ),
    (
        "delivery_id_printable",
        &[
            "INSERT INTO loms.delivery VALUES ('', '')",
            "INSERT INTO loms.delivery VALUES (E'two\\nlines', '')",
            "INSERT INTO loms.delivery VALUES (E'a line\\n', '')",
            "INSERT INTO loms.delivery VALUES ('märz', '')",
            "INSERT INTO loms.delivery VALUES (repeat('x', 129), '')",
        ],
    ),
    (
        "delivery_line_pkey",
        &["INSERT INTO loms.delivery_line VALUES ('march', 1, 7, 1)"],
    ),
    (
        "delivery_line_delivery_fkey",
        &[
            "INSERT INTO loms.delivery_line VALUES ('april', 1, 7, 1)",
            "DELETE FROM loms.delivery",
        ],
    ),
    (
        "delivery_line_count_positive",
        &["INSERT INTO loms.delivery_line VALUES ('march', 3, 7, 0)"],
    ),
    (
        "outbox_pkey",
        &[
            "INSERT INTO loms.outbox (id, order_id, sequence) SELECT id, order_id, sequence FROM loms.outbox",
        ],
    ),
    ("relay_pkey", &["INSERT INTO loms.relay DEFAULT VALUES"]),
    (
        "relay_only_row",
        &["INSERT INTO loms.relay (only_row) VALUES (FALSE)"],
    ),
    (
        "idempotency_key_pkey",
        &["INSERT INTO loms.idempotency_key VALUES (1, 'k', '', 2)"],
    ),
    (
        "idempotency_key_printable",
        &[
            "INSERT INTO loms.idempotency_key VALUES (1, '', '', 2)",
            "INSERT INTO loms.idempotency_key VALUES (1, E'k\\t', '', 2)",
            "INSERT INTO loms.idempotency_key VALUES (1, repeat('k', 129), '', 2)",
        ],
    ),
    (
        "import_pkey",
        &["INSERT INTO loms.import (state) VALUES ('done')"],
    ),
    (
        "import_only_row",
        &["UPDATE loms.import SET only_row = FALSE"],
    ),
    (
        "import_state_known",
        &["UPDATE loms.import SET state = 'begun'"],
    ),
    (
        "import_deficit_pkey",
        &["INSERT INTO loms.import_deficit VALUES (1, 9, 1)"],
    ),
    (
        "import_deficit_units_positive",
        &["INSERT INTO loms.import_deficit VALUES (1, 7, 0)"],
    ),
];
