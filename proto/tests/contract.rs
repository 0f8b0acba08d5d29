//! Holds the descriptor set against `contract.txt` and `routes.txt`, every line both ways: a field that disappeared, moved
//! or changed its type fails, and so does one that was added without being listed.

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    MethodDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

const CONTRACT: &str = include_str!("../contract.txt");
const ROUTES: &str = include_str!("../routes.txt");

/// Served to operators and to checkout over gRPC, never to HTTP clients.
const GRPC_ONLY: &[&str] = &["/loms.Loms/ReceiveStock", "/loms.Loms/AbandonOrder"];
/// Called, not served.
const OUTSIDE: &str = "/route256.product.ProductService/";

#[test]
fn the_descriptor_set_is_the_contract_and_nothing_else() {
    let listed = lines(CONTRACT);
    let compiled = describe(&descriptors());
    let missing: Vec<_> = listed.difference(&compiled).collect();
    let unlisted: Vec<_> = compiled.difference(&listed).collect();
    assert!(
        missing.is_empty(),
        "contract.txt has, the .proto files have not: {missing:#?}"
    );
    assert!(
        unlisted.is_empty(),
        "the .proto files have, contract.txt has not: {unlisted:#?}"
    );
}

#[test]
fn every_method_that_is_served_has_an_http_route_and_every_route_a_method() {
    let methods: BTreeSet<String> = descriptors()
        .file
        .iter()
        .flat_map(methods)
        .map(|(path, _)| path)
        .collect();
    let routed: BTreeSet<String> = routes().into_iter().map(|route| route.method).collect();
    let expected: BTreeSet<String> = methods
        .into_iter()
        .filter(|path| !path.starts_with(OUTSIDE) && !GRPC_ONLY.contains(&path.as_str()))
        .collect();
    assert_eq!(routed, expected);
}

#[test]
fn a_route_is_served_by_the_service_that_owns_its_method() {
    for Route {
        service,
        path,
        method,
    } in routes()
    {
        let owner = match method.split('.').next() {
            Some("/cart") => "checkout",
            Some("/loms") => "loms",
            Some("/notifications") => "notifications",
            other => panic!("{path}: no service has the package {other:?}"),
        };
        assert_eq!(service, owner, "{path}");
        assert!(
            path.starts_with('/') && !path[1..].contains('/'),
            "{path} is not one flat segment"
        );
    }
}

#[test]
fn no_message_and_no_service_hides_in_a_file_that_was_not_compared() {
    let packages: BTreeSet<_> = descriptors()
        .file
        .iter()
        .map(|file| file.package().to_owned())
        .collect();
    let known = [
        "cart",
        "google.protobuf",
        "loms",
        "notifications",
        "route256.product",
    ];
    assert_eq!(packages, known.map(str::to_owned).into());
}

struct Route {
    service: String,
    path: String,
    method: String,
}

fn routes() -> Vec<Route> {
    let rows = lines(ROUTES).into_iter();
    rows.map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
        [service, path, method] => Route {
            service: service.to_owned(),
            path: path.to_owned(),
            method: method.to_owned(),
        },
        _ => panic!("routes.txt: {line}"),
    })
    .collect()
}

/// The lines of a data file, columns one space apart, comments left out, none of them twice.
fn lines(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(found.insert(line.clone()), "listed twice: {line}");
    }
    found
}

fn descriptors() -> FileDescriptorSet {
    FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap()
}

fn describe(set: &FileDescriptorSet) -> BTreeSet<String> {
    let ours = || {
        set.file
            .iter()
            .filter(|file| !file.package().starts_with("google."))
    };
    let fields = ours().flat_map(|file| {
        let scope = file.package().to_owned();
        file.message_type
            .iter()
            .flat_map(move |message| message_lines(&scope, message))
    });
    let enums = ours().flat_map(|file| {
        file.enum_type
            .iter()
            .map(|listed| format!("enum {}.{}", file.package(), listed.name()))
    });
    let extensions = ours().flat_map(|file| {
        file.extension
            .iter()
            .map(|field| format!("extension {}", field.name()))
    });
    let methods = ours().flat_map(methods).map(|(_, line)| line);
    fields
        .chain(enums)
        .chain(extensions)
        .chain(methods)
        .collect()
}

fn message_lines(scope: &str, message: &DescriptorProto) -> Vec<String> {
    let name = format!("{scope}.{}", message.name());
    let mut found: Vec<_> = message
        .field
        .iter()
        .map(|field| field_line(&name, field))
        .collect();
    found.extend(
        message
            .nested_type
            .iter()
            .flat_map(|nested| message_lines(&name, nested)),
    );
    found.extend(
        message
            .enum_type
            .iter()
            .map(|listed| format!("enum {name}.{}", listed.name())),
    );
    found
}

fn field_line(message: &str, field: &FieldDescriptorProto) -> String {
    let mut kind = match field.r#type() {
        Type::Message | Type::Enum => field.type_name().trim_start_matches('.').to_owned(),
        // prost names the scalars as the .proto files do, in capitals after TYPE_
        scalar => scalar
            .as_str_name()
            .trim_start_matches("TYPE_")
            .to_lowercase(),
    };
    if field.label() == Label::Repeated {
        kind = format!("repeated {kind}");
    }
    if field.proto3_optional() {
        kind = format!("optional {kind}");
    } else if field.oneof_index.is_some() {
        kind = format!("oneof {kind}");
    }
    format!("field {message} {} {} {kind}", field.number(), field.name())
}

/// Each method's path, and its line.
fn methods(file: &FileDescriptorProto) -> Vec<(String, String)> {
    let package = file.package();
    let all = file
        .service
        .iter()
        .flat_map(|service| service.method.iter().map(move |method| (service, method)));
    all.map(|(service, method)| {
        let path = format!("/{package}.{}/{}", service.name(), method.name());
        let line = format!("method {path} {}", signature(method));
        (path, line)
    })
    .collect()
}

fn signature(method: &MethodDescriptorProto) -> String {
    let stream = |yes| if yes { "stream " } else { "" };
    format!(
        "{}{} -> {}{}",
        stream(method.client_streaming()),
        method.input_type().trim_start_matches('.'),
        stream(method.server_streaming()),
        method.output_type().trim_start_matches('.'),
    )
}
