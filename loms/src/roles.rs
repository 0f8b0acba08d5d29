//! Who may call which RPC, where the config gives roles.

use platform::roles::{Methods, Role};

/// Every RPC of the service; one that is missing here is for nobody.
pub const METHODS: Methods = &[
    ("/loms.Loms/CreateOrder", &[Role::Checkout]),
    ("/loms.Loms/ListOrder", Role::ANY),
    ("/loms.Loms/OrderPayed", &[Role::Gateway]),
    ("/loms.Loms/CancelOrder", &[Role::Checkout, Role::Gateway]),
    ("/loms.Loms/Stocks", Role::ANY),
    ("/loms.Loms/ReceiveStock", &[Role::Operator]),
];
