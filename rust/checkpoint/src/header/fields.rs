//! The JSON of a header: every key once, every field known, no list longer than it can be.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use safetensors::Dtype;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{
    DeserializeSeed, Deserializer, Error, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};
use serde::Deserialize;

use super::{is_printable, shortened, Tensor, MAX_DIMENSIONS};

pub(super) const METADATA: &str = "__metadata__";

/// The JSON object, as it stands.
pub(super) struct Fields {
    pub(super) tensors: Vec<Tensor>,
    pub(super) metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Found;
        impl<'de> Visitor<'de> for Found {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), None);
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        let found: Option<Metadata> = map.next_value()?;
                        if metadata.replace(found.map_or_else(BTreeMap::new, |m| m.0)).is_some() {
                            return Err(A::Error::custom(format!("the key {METADATA} twice")));
                        }
                        continue;
                    }
                    if !is_printable(&name) {
                        let what =
                            format!("the name {name:?} of a tensor holds control characters");
                        return Err(A::Error::custom(what));
                    }
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("the key {name:?} twice")));
                    }
                    tensors.push(map.next_value_seed(Entry { name })?);
                }
                Ok(Fields { tensors, metadata: metadata.unwrap_or_default() })
            }
        }
        from.deserialize_map(Found)
    }
}

/// `__metadata__`: strings by name, each name once.
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Strings { of: METADATA }).map(Self)
    }
}

/// An object of strings by name, each name once.
pub(crate) struct Strings {
    /// Where it stands.
    pub(crate) of: &'static str,
}

impl<'de> Visitor<'de> for Strings {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as an object of strings", self.of)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if found.contains_key(&key) {
                return Err(A::Error::custom(format!("the key {key:?} twice in {}", self.of)));
            }
            found.insert(key, value);
        }
        Ok(found)
    }
}

impl<'de> DeserializeSeed<'de> for Strings {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

/// One tensor: an object of exactly three fields.
struct Entry {
    name: String,
}

impl<'de> DeserializeSeed<'de> for Entry {
    type Value = Tensor;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Tensor, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entry {
    type Value = Tensor;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor {:?} as an object of dtype, shape and data_offsets", self.name)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tensor, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        let name = self.name;
        while let Some(field) = map.next_key::<String>()? {
            let twice = match field.as_str() {
                "dtype" => dtype.replace(dtype_of(&name, &map.next_value::<String>()?)?).is_some(),
                "shape" => shape.replace(map.next_value::<Sizes>()?.0).is_some(),
                "data_offsets" => offsets.replace(map.next_value::<(u64, u64)>()?).is_some(),
                _ => {
                    let what = format!(
                        "tensor {name:?}: field {field:?}, allowed are dtype, shape, data_offsets"
                    );
                    return Err(A::Error::custom(what));
                }
            };
            if twice {
                return Err(A::Error::custom(format!("tensor {name:?}: field {field:?} twice")));
            }
        }
        let (Some(dtype), Some(shape), Some((begin, end))) = (dtype, shape, offsets) else {
            let what = format!("tensor {name:?} needs dtype, shape and data_offsets");
            return Err(A::Error::custom(what));
        };
        Ok(Tensor { name, dtype, shape, begin, end })
    }
}

fn dtype_of<E: Error>(name: &str, dtype: &str) -> Result<Dtype, E> {
    let shown = shortened(&dtype.escape_debug().to_string()); // of a dtype that exists: itself
    let from: StrDeserializer<'_, ValueError> = shown.as_str().into_deserializer();
    Dtype::deserialize(from).map_err(|error| E::custom(format!("tensor {name:?}: dtype: {error}")))
}

/// A shape: no more sizes than a tensor can have, however long the list is.
struct Sizes(Vec<u64>);

impl<'de> Deserialize<'de> for Sizes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Sizes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Sizes, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = list.next_element()? {
                    if sizes.len() == MAX_DIMENSIONS {
                        let what = format!("a shape of more than {MAX_DIMENSIONS} dimensions");
                        return Err(A::Error::custom(what));
                    }
                    sizes.push(size);
                }
                Ok(Sizes(sizes))
            }
        }
        from.deserialize_seq(List)
    }
}
