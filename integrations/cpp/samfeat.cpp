// Keypoints and descriptors of PPM images with an exported student, and the mutual matches of two. Without Python.
//
//   samfeat MODEL.onnx IMAGE.ppm [SECOND.ppm]
//
// writes IMAGE.npy, float32 [K, 131]: x, y (pixels, (0, 0) is the centre of the top-left one), score and the 128 values
// of the descriptor, best first; of two images also matches.npy beside the first, int64 [M, 2], rows of both. It computes
// what SAMFeat.extract and samfeat.match of the Python package compute, from the maps of the model.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <numeric>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

using Path = std::filesystem::path;
constexpr size_t kLength = 128;  // of a descriptor
using Row = std::array<float, 3 + kLength>;

struct Image {
  size_t height = 0, width = 0;
  std::vector<float> values;  // [3, height, width], RGB in [0, 1]
};

// A map of the model, [channels, height, width].
struct Map {
  const float* data;
  size_t channels, height, width;

  // Bilinear value at (x, y) of the image that the network saw; border values are repeated outside.
  float at(size_t channel, float x, float y, size_t image_height, size_t image_width) const {
    const auto place = [](float position, size_t length, size_t image_length) {
      const float scaled = (position + 0.5f) * length / image_length - 0.5f;
      return std::clamp(scaled, 0.0f, static_cast<float>(length - 1));
    };
    const float u = place(x, width, image_width), v = place(y, height, image_height);
    const size_t x0 = static_cast<size_t>(u), y0 = static_cast<size_t>(v);
    const size_t x1 = std::min(x0 + 1, width - 1), y1 = std::min(y0 + 1, height - 1);
    const float right = u - x0, below = v - y0, *values = data + channel * height * width;
    return (1 - below) * ((1 - right) * values[y0 * width + x0] + right * values[y0 * width + x1]) +
           below * ((1 - right) * values[y1 * width + x0] + right * values[y1 * width + x1]);
  }
};

// What the model was exported with.
struct Options {
  size_t keypoints;
  double threshold;
  int radius, border;
  bool subpixel, weighted;
};

Image read_ppm(const Path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + " cannot be opened");
  std::string kind;
  size_t width = 0, height = 0, highest = 0;
  const auto number = [&file](size_t& value) {
    while (file >> std::ws && file.peek() == '#') file.ignore(1 << 20, '\n');
    file >> value;
  };
  file >> kind;
  number(width), number(height), number(highest);
  file.get();
  if (!file || kind != "P6" || highest != 255)
    throw std::runtime_error(path.string() + " is not a binary PPM of 8 bits: convert it to one");
  if (std::min(width, height) < 16 || std::max(width, height) > 1 << 14)
    throw std::runtime_error(path.string() + ": each side must have 16 to 16384 pixels");
  std::vector<uint8_t> bytes(3 * width * height);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), bytes.size()))
    throw std::runtime_error(path.string() + " is cut short");
  Image image{height, width, std::vector<float>(bytes.size())};
  for (size_t pixel = 0; pixel < width * height; ++pixel)
    for (size_t channel = 0; channel < 3; ++channel)
      image.values[channel * width * height + pixel] = bytes[3 * pixel + channel] / 255.0f;
  return image;
}

// Pixels of the best keypoints: threshold, greedy suppression within a square, border, limit.
std::vector<size_t> detect(const Map& heatmap, const Options& options) {
  const int height = heatmap.height, width = heatmap.width;
  std::vector<size_t> order;
  for (size_t pixel = 0; pixel < heatmap.height * heatmap.width; ++pixel)
    if (1 / (1 + std::exp(-heatmap.data[pixel])) >= options.threshold) order.push_back(pixel);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return heatmap.data[a] > heatmap.data[b]; });
  std::vector<char> taken(heatmap.height * heatmap.width, 0);
  std::vector<size_t> kept;
  for (const size_t pixel : order) {
    if (taken[pixel]) continue;
    const int x = pixel % width, y = pixel / width, radius = options.radius, border = options.border;
    for (int row = std::max(0, y - radius); row <= std::min(height - 1, y + radius); ++row)
      std::fill_n(taken.begin() + row * width + std::max(0, x - radius),
                  std::min(width - 1, x + radius) - std::max(0, x - radius) + 1, 1);
    if (std::min(x, y) >= border && x < width - border && y < height - border) kept.push_back(pixel);
    if (kept.size() == options.keypoints) break;
  }
  return kept;
}

// Offset (x, y) from a pixel to the peak of the quadratic through its neighbourhood, at most half a pixel.
std::array<float, 2> subpixel(const Map& heatmap, int x, int y) {
  const auto at = [&](int dy, int dx) {
    const int row = std::clamp<int>(y + dy, 0, heatmap.height - 1);
    const int column = std::clamp<int>(x + dx, 0, heatmap.width - 1);
    return heatmap.data[row * heatmap.width + column];
  };
  const float gx = (at(0, 1) - at(0, -1)) / 2, gy = (at(1, 0) - at(-1, 0)) / 2;
  const float xx = at(0, 1) - 2 * at(0, 0) + at(0, -1), yy = at(1, 0) - 2 * at(0, 0) + at(-1, 0);
  const float xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4, determinant = xx * yy - xy * xy;
  if (xx >= 0 || determinant <= 0) return {0, 0};
  return {std::clamp((xy * gy - yy * gx) / determinant, -0.5f, 0.5f),
          std::clamp((xy * gx - xx * gy) / determinant, -0.5f, 0.5f)};
}

std::vector<Row> features(const Image& image, const Map& heatmap, const Map& descriptors, const Map& attention,
                          const Options& options) {
  const size_t height = heatmap.height, width = heatmap.width;  // nearest multiples of 16
  std::vector<Row> rows;
  for (const size_t pixel : detect(heatmap, options)) {
    const int column = pixel % width, line = pixel / width;
    const auto offset = options.subpixel ? subpixel(heatmap, column, line) : std::array<float, 2>{0, 0};
    const float x = column + offset[0], y = line + offset[1];
    Row row;
    row[0] = std::clamp((x + 0.5f) * image.width / width - 0.5f, 0.0f, image.width - 1.0f);
    row[1] = std::clamp((y + 0.5f) * image.height / height - 0.5f, 0.0f, image.height - 1.0f);
    row[2] = 1 / (1 + std::exp(-heatmap.data[pixel]));
    float square = 0;
    for (size_t k = 0; k < kLength; ++k) {
      row[3 + k] = descriptors.at(k, x, y, height, width);
      square += row[3 + k] * row[3 + k];
    }
    const float weight = options.weighted ? attention.at(0, x, y, height, width) : 1;
    const float factor = weight / std::max(std::sqrt(square), 1e-12f);
    std::for_each(row.begin() + 3, row.end(), [factor](float& value) { value *= factor; });
    rows.push_back(row);
  }
  return rows;
}

// Rows that are each other's best by the dot product of their descriptors.
std::vector<std::array<int64_t, 2>> match(const std::vector<Row>& first, const std::vector<Row>& second) {
  std::vector<size_t> best0(first.size(), 0), best1(second.size(), 0);
  std::vector<float> score0(first.size(), -INFINITY), score1(second.size(), -INFINITY);
  for (size_t i = 0; i < first.size(); ++i)
    for (size_t j = 0; j < second.size(); ++j) {
      const float score = std::inner_product(first[i].begin() + 3, first[i].end(), second[j].begin() + 3, 0.0f);
      if (score > score0[i]) score0[i] = score, best0[i] = j;
      if (score > score1[j]) score1[j] = score, best1[j] = i;
    }
  std::vector<std::array<int64_t, 2>> matches;
  for (size_t i = 0; i < first.size() && !second.empty(); ++i)
    if (best1[best0[i]] == i) matches.push_back({static_cast<int64_t>(i), static_cast<int64_t>(best0[i])});
  return matches;
}

// A NumPy array [rows, row length].
template <typename Value, size_t N>
void write_npy(const Path& path, const std::vector<std::array<Value, N>>& rows, const std::string& type) {
  std::string header = "{'descr': '" + type + "', 'fortran_order': False, 'shape': (" + std::to_string(rows.size()) +
                       ", " + std::to_string(N) + "), }";
  header.resize((10 + header.size() + 64) / 64 * 64 - 11, ' ');
  header += '\n';
  const uint16_t length = header.size();
  std::ofstream file(path, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8).write(reinterpret_cast<const char*>(&length), 2) << header;
  file.write(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(rows[0]));
  file.flush();
  if (!file) throw std::runtime_error(path.string() + " cannot be written");
}

// The value of a key of a section of the model's metadata, which is JSON.
std::string value_of(const std::string& json, const std::string& section, const std::string& key) {
  const size_t start = json.find('"' + key + '"', json.find('"' + section + "\": {"));
  if (start == std::string::npos) throw std::runtime_error("the model does not say its " + section + "." + key);
  const size_t colon = json.find(':', start) + 1, end = json.find_first_of(",}", colon);
  const size_t first = json.find_first_not_of(" \"", colon);
  return json.substr(first, json.find_last_not_of(" \"", end - 1) - first + 1);
}

// The maps of an exported model, without its suppression, which is slow as a loop in a model, and its options.
std::pair<std::shared_ptr<ov::Model>, Options> read_model(ov::Core& core, const Path& path) {
  if (!std::filesystem::exists(path)) throw std::runtime_error(path.string() + " does not exist");
  if (path.extension() != ".onnx") throw std::runtime_error(path.string() + " is not an .onnx file");
  std::shared_ptr<ov::Model> whole;
  ov::OutputVector maps;
  std::string json;
  try {
    whole = core.read_model(path.string());
    for (const char* name : {"heatmap", "descriptor_map", "attention_map"})
      maps.push_back(whole->output(name).get_node()->input_value(0));
    json = whole->get_rt_info<std::string>({"framework", "samfeat-weights"});
  } catch (const ov::Exception&) {
    throw std::runtime_error(path.string() + " is not a model that samfeat-cli export wrote");
  }
  if (value_of(json, "network", "sampling") != "exact")
    throw std::runtime_error(path.string() + " has the released network's sampling, which is not supported");
  const auto option = [&json](const std::string& key) { return value_of(json, "extraction", key); };
  const Options options{std::stoul(option("max_keypoints")), std::stod(option("detection_threshold")),
                        std::stoi(option("nms_radius")),     std::stoi(option("border")),
                        option("subpixel") == "true",        option("weighted_descriptors") == "true"};
  return {std::make_shared<ov::Model>(maps, whole->get_parameters()), options};
}

int main(int count, char** words) try {
  if (count != 3 && count != 4) throw std::runtime_error("usage: samfeat MODEL.onnx IMAGE.ppm [SECOND.ppm]");
  ov::Core core;
  const auto [model, options] = read_model(core, words[1]);
  std::vector<std::vector<Row>> found;
  for (int word = 2; word < count; ++word) {
    Image image = read_ppm(words[word]);
    const ov::Shape shape{1, 3, image.height, image.width};
    const auto sized = model->clone();
    sized->reshape(ov::PartialShape(shape));  // faster than a model of any size
    auto request = core.compile_model(sized, "CPU", ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY))
                       .create_infer_request();
    request.set_input_tensor(ov::Tensor(ov::element::f32, shape, image.values.data()));
    request.infer();
    std::array<Map, 3> maps;
    for (size_t k = 0; k < maps.size(); ++k) {
      const ov::Tensor map = request.get_output_tensor(k);
      maps[k] = {map.data<float>(), map.get_shape()[1], map.get_shape()[2], map.get_shape()[3]};
    }
    found.push_back(features(image, maps[0], maps[1], maps[2], options));
    const Path path = Path(words[word]).replace_extension(".npy");
    write_npy(path, found.back(), "<f4");
    std::cout << found.back().size() << " keypoints: " << path.string() << '\n';
  }
  if (found.size() == 2) {
    const auto matches = match(found[0], found[1]);
    const Path path = Path(words[2]).replace_filename("matches.npy");
    write_npy(path, matches, "<i8");
    std::cout << matches.size() << " matches: " << path.string() << '\n';
  }
  return 0;
} catch (const std::exception& error) {
  const std::string text = error.what();
  std::cerr << "samfeat: " << text.substr(0, text.find('\n')) << '\n';
  return 2;
}
