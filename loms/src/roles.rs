//! Who may call which RPC, where the config gives roles.

use platform::roles::{Methods, Role};

/// Every RPC of the service and the roles that may call it. A method that is missing here is
/// refused.
pub const METHODS: Methods = &[
    ("/loms.Loms/CreateOrder", &[Role::Checkout]),
    ("/loms.Loms/ListOrder", Role::ANY),
    ("/loms.Loms/OrderPayed", &[Role::Gateway]),
    ("/loms.Loms/CancelOrder", &[Role::Checkout, Role::Gateway]),
    ("/loms.Loms/Stocks", Role::ANY),
    ("/loms.Loms/ReceiveStock", &[Role::Operator]),
    ("/loms.Loms/AbandonOrder", &[Role::Checkout]),
];
