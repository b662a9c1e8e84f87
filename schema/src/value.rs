//! The types a recipe's values have, and how each is read, described and written.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use toml_writer::ToTomlValue;

use crate::{Field, Item, Key, Node, Reader, Value, Writer};

/// A model as the recipe names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A Hugging Face folder, absolute.
    Folder(PathBuf),
    /// `owner/name` on the hub.
    Hub(String),
}

/// Where the program makes a file or a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPath(pub PathBuf);

/// A number the program works out unless the recipe gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Auto<T> {
    /// Decided when the model and the devices are known.
    Auto,
    /// Given by the recipe.
    Fixed(T),
}

impl<T: Copy> Auto<T> {
    /// The value, where the recipe gives one.
    pub fn fixed(self) -> Option<T> {
        match self {
            Auto::Auto => None,
            Auto::Fixed(value) => Some(value),
        }
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelSource::Folder(path) => write!(f, "{}", path.display()),
            ModelSource::Hub(id) => f.write_str(id),
        }
    }
}

impl Default for ModelSource {
    /// The empty name, which no recipe that loads keeps: the key is required wherever this default is used.
    fn default() -> Self {
        ModelSource::Hub(String::new())
    }
}

/// A value written on one line.
pub trait Scalar: Sized {
    /// Whether `"off"` may stand for an absent value: for numbers, which have no word of their own.
    const OFF: bool = false;
    /// "integer", "path" …
    fn kind() -> String;
    /// What the values mean, where the type says more than the key's doc.
    fn explain() -> String {
        String::new()
    }
    /// Reads the value, or reports why it cannot be read.
    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self>;
    /// The value as TOML.
    fn show(&self) -> String;
    /// As `kind`, where the value may be `"auto"`.
    fn auto_kind() -> String {
        format!("{} or `\"auto\"`", Self::kind())
    }
    /// As `explain`, where the value may be `"auto"`.
    fn auto_explain() -> String {
        String::new()
    }
    /// As `parse`, where the value may be `"auto"`.
    fn parse_auto(field: &Field, node: &Node, reader: &mut Reader) -> Option<Auto<Self>> {
        match &node.item {
            Item::String(text) if text == "auto" => Some(Auto::Auto),
            Item::String(_) => {
                reader.wrong_type(field.name, node, &format!("{} or \"auto\"", Self::kind()));
                None
            }
            _ => Self::parse(field, node, reader).map(Auto::Fixed),
        }
    }
}

impl Scalar for bool {
    fn kind() -> String {
        "`true` or `false`".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        let Item::Boolean(value) = node.item else {
            reader.wrong_type(field.name, node, "`true` or `false`");
            return None;
        };
        Some(value)
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Scalar for f64 {
    const OFF: bool = true;

    fn kind() -> String {
        "number".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        let value = match node.item {
            Item::Float(value) => value,
            Item::Integer(value) => value as f64,
            _ => {
                reader.wrong_type(field.name, node, "a number");
                return None;
            }
        };
        reader.check_range(field, node, value).then_some(value)
    }

    fn show(&self) -> String {
        format!("{self:?}")
    }
}

impl Scalar for u64 {
    const OFF: bool = true;

    fn kind() -> String {
        "integer".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        match node.item {
            Item::Integer(value) if !reader.check_range(field, node, value as f64) => None,
            Item::Integer(value) => u64::try_from(value).ok(),
            _ => {
                reader.wrong_type(field.name, node, "an integer");
                None
            }
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Scalar for usize {
    const OFF: bool = true;

    fn kind() -> String {
        u64::kind()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        u64::parse(field, node, reader).and_then(|value| value.try_into().ok())
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Scalar for [f64; 2] {
    const OFF: bool = true;

    fn kind() -> String {
        "two numbers".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        match &node.item {
            Item::Array(elements) if elements.len() == 2 => {
                let first = f64::parse(field, &elements[0], reader);
                let second = f64::parse(field, &elements[1], reader);
                Some([first?, second?])
            }
            _ => {
                reader.wrong_type(field.name, node, "a list of two numbers");
                None
            }
        }
    }

    fn show(&self) -> String {
        format!("[{:?}, {:?}]", self[0], self[1])
    }
}

impl Scalar for String {
    fn kind() -> String {
        "string".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        let Item::String(text) = &node.item else {
            reader.wrong_type(field.name, node, "a string");
            return None;
        };
        Some(text.clone())
    }

    fn show(&self) -> String {
        self.to_toml_value()
    }
}

impl Scalar for SocketAddr {
    fn kind() -> String {
        "IP address with port".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        let expected = "an IP address with a port, such as \"0.0.0.0:7401\"";
        let address = if let Item::String(text) = &node.item { text.parse().ok() } else { None };
        if address.is_none() {
            reader.wrong_type(field.name, node, expected);
        }
        address
    }

    fn show(&self) -> String {
        self.to_string().show()
    }
}

impl Scalar for PathBuf {
    fn kind() -> String {
        "path".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        let written = String::parse(field, node, reader)?;
        let path = reader.documents.resolve_path(&node.origin, &written);
        if reader.check_files && (written.is_empty() || !path.exists()) {
            let message = format!("`{}`: `{written}` does not exist", reader.dotted(field.name));
            reader.report(node, message, &looked_for(&path, node));
            return None;
        }
        Some(path)
    }

    fn show(&self) -> String {
        self.display().to_string().show()
    }
}

impl Scalar for NewPath {
    fn kind() -> String {
        "path".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        let written = String::parse(field, node, reader)?;
        if written.is_empty() {
            reader.wrong_type(field.name, node, "a path");
            return None;
        }
        Some(NewPath(reader.documents.resolve_path(&node.origin, &written)))
    }

    fn show(&self) -> String {
        self.0.show()
    }
}

impl Scalar for ModelSource {
    fn kind() -> String {
        "folder or hub id".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        let written = String::parse(field, node, reader)?;
        let path = reader.documents.resolve_path(&node.origin, &written);
        if !written.is_empty() && path.is_dir() {
            if reader.check_files && !path.join("config.json").exists() {
                let message = format!("`{}`: `{written}` has no config.json", reader.dotted(field.name));
                reader.report(node, message, &looked_for(&path, node));
                return None;
            }
            return Some(ModelSource::Folder(path));
        }
        if is_hub_id(&written) {
            return Some(ModelSource::Hub(written));
        }
        if !reader.check_files && !written.is_empty() {
            return Some(ModelSource::Folder(path));
        }
        let name = reader.dotted(field.name);
        let message = format!("`{name}`: `{written}` is no folder, and no hub id of the form `owner/name`");
        reader.report(node, message, &looked_for(&path, node));
        None
    }

    fn show(&self) -> String {
        self.to_string().show()
    }
}

fn looked_for(path: &Path, node: &Node) -> String {
    let rule = if node.origin.document == 0 { "relative to the recipe" } else { "relative to the working directory" };
    format!("looked for {} ({rule})", path.display())
}

/// `owner/name` in the hub's alphabet.
fn is_hub_id(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let part = |text: &str| text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(allowed);
    text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

impl<S: Scalar> Scalar for Auto<S> {
    fn kind() -> String {
        S::auto_kind()
    }

    fn explain() -> String {
        S::auto_explain()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        S::parse_auto(field, node, reader)
    }

    fn show(&self) -> String {
        match self {
            Auto::Auto => "\"auto\"".into(),
            Auto::Fixed(value) => value.show(),
        }
    }
}

impl Scalar for Vec<String> {
    fn kind() -> String {
        "list of strings".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        list(field, node, reader, "a list of strings")
    }

    fn show(&self) -> String {
        show_list(self)
    }
}

impl Scalar for Vec<usize> {
    fn kind() -> String {
        "list of integers".into()
    }

    fn parse(field: &Field, node: &Node, reader: &mut Reader) -> Option<Self> {
        list(field, node, reader, "a list of integers")
    }

    fn show(&self) -> String {
        show_list(self)
    }
}

fn list<S: Scalar>(field: &Field, node: &Node, reader: &mut Reader, expected: &str) -> Option<Vec<S>> {
    let Item::Array(elements) = &node.item else {
        reader.wrong_type(field.name, node, expected);
        return None;
    };
    elements.iter().map(|element| S::parse(field, element, reader)).collect()
}

fn show_list<S: Scalar>(values: &[S]) -> String {
    format!("[{}]", values.iter().map(Scalar::show).collect::<Vec<_>>().join(", "))
}

/// A scalar's key: present in full, with its default.
pub fn describe_scalar<S: Scalar>(value: Option<&S>, kind: String, field: &Field) -> Key {
    Key {
        name: field.name,
        doc: field.doc.to_owned() + &S::explain(),
        kind,
        range: field.range.words(),
        default: value.filter(|_| !field.required).map(Scalar::show),
        required: field.required,
        table: None,
        repeated: false,
    }
}

impl<S: Scalar> Value for Option<S> {
    fn read(&mut self, field: &Field, node: &Node, reader: &mut Reader) {
        let off = S::OFF && matches!(&node.item, Item::String(text) if text == "off");
        *self = if off { None } else { S::parse(field, node, reader) };
    }

    fn describe(&self, field: &Field) -> Key {
        let kind = if S::OFF { format!("{} or `\"off\"`", S::kind()) } else { S::kind() };
        let mut key = describe_scalar(self.as_ref(), kind, field);
        if S::OFF && self.is_none() {
            key.default = Some("\"off\"".into());
        }
        key
    }

    fn write(&self, name: &str, default: &Self, section: usize, writer: &mut Writer) {
        match self {
            Some(value) => writer.line(section, name, &value.show()),
            None if S::OFF && default.is_some() => writer.line(section, name, "\"off\""),
            None => {}
        }
    }
}

/// Lets scalars stand to the right of a key.
#[doc(hidden)]
#[macro_export]
macro_rules! scalar_value {
    (@impl [$($generics:tt)*] $Type:ty) => {
        impl $($generics)* $crate::Value for $Type {
            fn read(
                &mut self,
                field: &$crate::Field,
                node: &$crate::Node,
                reader: &mut $crate::Reader,
            ) {
                if let Some(value) = $crate::Scalar::parse(field, node, reader) {
                    *self = value;
                }
            }

            fn describe(&self, field: &$crate::Field) -> $crate::Key {
                let kind = <$Type as $crate::Scalar>::kind();
                $crate::describe_scalar(Some(self), kind, field)
            }

            fn write(&self, name: &str, _: &Self, section: usize, writer: &mut $crate::Writer) {
                writer.line(section, name, &$crate::Scalar::show(self));
            }
        }
    };
    ($($Type:ty),* $(,)?) => {
        $( $crate::scalar_value!(@impl [] $Type); )*
    };
}

scalar_value!(bool, f64, u64, usize, [f64; 2], String, PathBuf, ModelSource, Vec<String>, Vec<usize>);
scalar_value!(@impl [<S: Scalar>] Auto<S>);
