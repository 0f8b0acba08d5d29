//! Who may call what: a service's table of its methods, held against the roles that the config gives to the names in a
//! caller's certificate. A method that is not in the table may be called by nobody.

use std::{collections::BTreeMap, sync::Arc};

use serde::Deserialize;

use crate::{
    error::{Code, Detail, Fault},
    peer::{Caller, Peer},
};

/// What a caller may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Books stock.
    Operator,
    /// Places orders and takes them back.
    Checkout,
    /// Speaks for users.
    Gateway,
    /// Looks, and changes nothing.
    Reader,
}

impl Role {
    /// Every role there is.
    pub const ANY: &'static [Role] = &[Role::Operator, Role::Checkout, Role::Gateway, Role::Reader];

    fn name(self) -> &'static str {
        match self {
            Role::Operator => "operator",
            Role::Checkout => "checkout",
            Role::Gateway => "gateway",
            Role::Reader => "reader",
        }
    }
}

/// The config's `roles`: a DNS or URI name of a certificate, exactly, and what its owner is;
/// [`EVERYBODY`].
pub type Roles = BTreeMap<String, Vec<Role>>;

/// Reads `roles:` where there is such a key. With nothing under it nobody is named, which is not
/// the same as no key.
///
/// # Errors
/// What is there is no table of roles.
pub fn given<'de, D: serde::Deserializer<'de>>(reader: D) -> Result<Option<Roles>, D::Error> {
    Option::<Roles>::deserialize(reader).map(|roles| Some(roles.unwrap_or_default()))
}

/// The name in `roles` of every caller, with a certificate or without. No certificate can have it:
/// a DNS name with an asterisk has a dot.
pub const EVERYBODY: &str = "*";

/// Whether these roles let nobody in without a certificate.
pub(crate) fn need_certificate(roles: &Roles) -> bool {
    !roles.contains_key(EVERYBODY)
}

/// A service's RPCs by their full path, `/loms.Loms/Stocks`, and the roles that may call each.
pub type Methods = &'static [(&'static str, &'static [Role])];

/// A service's table, and whom the config lets in; clones share it.
#[derive(Clone)]
pub struct Policy {
    methods: Methods,
    roles: Option<Arc<Roles>>,
}

impl Policy {
    /// Without `roles` everybody may call everything.
    pub fn new(methods: Methods, roles: Option<&Roles>) -> Policy {
        Policy {
            methods,
            roles: roles.cloned().map(Arc::new),
        }
    }

    /// Whether nobody may call without a certificate.
    pub(crate) fn needs_certificate(&self) -> bool {
        self.roles.as_deref().is_some_and(need_certificate)
    }

    /// The method as a label of a metric: what is no method is the caller's word.
    pub(crate) fn label(&self, path: &str) -> &'static str {
        self.method(path).map_or("unknown", |(method, _)| method)
    }

    fn method(&self, path: &str) -> Option<(&'static str, &'static [Role])> {
        let mut methods = self.methods.iter();
        methods.find(|(method, _)| *method == path).copied()
    }

    /// Whom a call to `path` comes from, when roles say so.
    ///
    /// # Errors
    /// UNAUTHENTICATED without a certificate, PERMISSION_DENIED `ROLE_REQUIRED` without the role.
    pub(crate) fn admit(&self, path: &str, peer: Option<&Peer>) -> Result<Option<Caller>, Fault> {
        let Some(roles) = &self.roles else {
            return Ok(None);
        };
        let allowed = self.method(path).map_or(&[][..], |(_, allowed)| allowed);
        let may = |name: &str| {
            let held = roles.get(name).into_iter().flatten();
            held.into_iter().any(|role| allowed.contains(role))
        };
        let is_one_of_all = !peer.is_some_and(Peer::has_no_roles);
        let peer = peer.filter(|peer| peer.is_verified());
        let names = peer.map_or(&[][..], Peer::names);
        match names.iter().find(|name| may(name)) {
            Some(name) => Ok(Some(Caller(name.clone()))),
            None if is_one_of_all && may(EVERYBODY) => Ok(None),
            None if peer.is_none() => Err(certificate_required()),
            None => Err(role_required(allowed)),
        }
    }
}

pub(crate) fn certificate_required() -> Fault {
    Fault::new(
        Code::Unauthenticated,
        "only a caller with a client certificate may do this",
    )
}

fn role_required(allowed: &[Role]) -> Fault {
    let names: Vec<_> = allowed.iter().map(|role| role.name()).collect();
    let names = names.join(", ");
    let message = if allowed.is_empty() {
        "no role may call this method".to_owned()
    } else {
        format!("the caller's certificate has none of the roles that may do this: {names}")
    };
    Fault {
        code: Code::PermissionDenied,
        message,
        detail: Detail::Reason {
            reason: "ROLE_REQUIRED",
            metadata: vec![("roles".into(), names)],
        },
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};
    use serde_json::json;

    use super::*;

    const METHODS: Methods = &[
        ("/shop.Shop/Look", Role::ANY),
        ("/shop.Shop/Fill", &[Role::Operator]),
    ];

    fn policy(roles: serde_json::Value) -> Policy {
        let roles: Roles = serde_json::from_value(roles).unwrap();
        Policy::new(METHODS, Some(&roles))
    }

    fn peer(names: &[&str]) -> Peer {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).unwrap();
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Peer::of(Some(certificate.der()))
    }

    fn refused(policy: &Policy, path: &str, peer: Option<&Peer>) -> Code {
        policy.admit(path, peer).unwrap_err().code
    }

    #[test]
    fn a_name_is_matched_exactly_and_any_of_several_will_do() {
        let policy = policy(json!({"desk.shop": ["operator"], "*.shop": ["operator"]}));
        for names in [&["desk.shop"][..], &["localhost", "desk.shop"]] {
            let admitted = policy.admit("/shop.Shop/Fill", Some(&peer(names)));
            assert_eq!(admitted.unwrap().unwrap().0, "desk.shop");
        }
        for name in [
            "Desk.shop",
            "desk.shop.",
            "desk",
            "a.desk.shop",
            "till.shop",
        ] {
            let code = refused(&policy, "/shop.Shop/Fill", Some(&peer(&[name])));
            assert_eq!(code, Code::PermissionDenied, "{name}");
        }
        // a wildcard in a certificate is a name as any other
        assert_eq!(
            refused(
                &policy_of_desk(),
                "/shop.Shop/Fill",
                Some(&peer(&["*.shop"]))
            ),
            Code::PermissionDenied
        );
    }

    fn policy_of_desk() -> Policy {
        policy(json!({"desk.shop": ["operator"]}))
    }

    #[test]
    fn what_is_not_in_the_table_is_for_nobody() {
        let policy = policy(json!({"root": ["operator", "checkout", "gateway", "reader"]}));
        let root = peer(&["root"]);
        assert!(policy.admit("/shop.Shop/Look", Some(&root)).is_ok());
        for path in [
            "/shop.Shop/Burn",
            "/shop.Shop/Look/",
            "//shop.Shop/Look",
            "/shop.shop/Look",
            "/shop.Shop/%4cook",
            "/shop.Shop/Look?x",
            "",
        ] {
            assert_eq!(refused(&policy, path, Some(&root)), Code::PermissionDenied);
            assert_eq!(policy.label(path), "unknown", "{path}");
        }
        let refused = policy.admit("/shop.Shop/Burn", Some(&root)).unwrap_err();
        assert!(refused.message.contains("no role"), "{refused:?}");
    }

    #[test]
    fn nobody_is_told_from_somebody_without_the_role() {
        let policy = policy(json!({"desk": ["operator"], "mute": []}));
        for nobody in [None, Some(&Peer::default())] {
            assert_eq!(
                refused(&policy, "/shop.Shop/Look", nobody),
                Code::Unauthenticated
            );
        }
        for name in ["mute", "unknown"] {
            let refused = policy
                .admit("/shop.Shop/Fill", Some(&peer(&[name])))
                .unwrap_err();
            assert!(refused.message.ends_with(": operator"), "{refused:?}");
            assert!(
                matches!(
                    refused.detail,
                    Detail::Reason {
                        reason: "ROLE_REQUIRED",
                        ..
                    }
                ),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn everybody_has_what_everybody_is_given_and_no_more() {
        let policy = policy(json!({"desk": ["operator"], "*": ["reader"]}));
        assert!(!policy.needs_certificate());
        let (desk, other) = (peer(&["desk"]), peer(&["other"]));
        for anybody in [None, Some(&other)] {
            assert!(policy.admit("/shop.Shop/Look", anybody).unwrap().is_none());
        }
        for path in ["/shop.Shop/Look", "/shop.Shop/Fill"] {
            let admitted = policy.admit(path, Some(&desk));
            assert!(admitted.is_ok(), "{path}");
        }
        let unseen = refused(&policy, "/shop.Shop/Fill", None);
        assert_eq!(unseen, Code::Unauthenticated);
        for name in ["other", "*"] {
            let denied = refused(&policy, "/shop.Shop/Fill", Some(&peer(&[name])));
            assert_eq!(denied, Code::PermissionDenied, "{name}");
        }
        let unknown = refused(&policy, "/shop.Shop/Burn", Some(&desk));
        assert_eq!(unknown, Code::PermissionDenied);
    }

    #[test]
    fn without_roles_everything_is_open() {
        let policy = Policy::new(METHODS, None);
        for path in ["/shop.Shop/Fill", "/shop.Shop/Burn"] {
            assert!(policy.admit(path, None).unwrap().is_none());
        }
        assert!(!policy.needs_certificate());
    }
}
