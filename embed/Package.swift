// swift-tools-version:5.9
// The Swift package AHN over the C library in this directory.
//
// On a Mac with AHN.xcframework beside this file (scripts/make-xcframework.sh makes it) an app adds
// this package and needs nothing else. Without it, libahn is taken from where CMake has put it:
//     swift build -Xlinker -L$BUILD -Xlinker -rpath -Xlinker $BUILD
import Foundation
import PackageDescription

let directory = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
let framework = directory.appendingPathComponent("AHN.xcframework")
let packed = FileManager.default.fileExists(atPath: framework.path)

let library: Target =
  packed
  ? .binaryTarget(name: "CAHN", path: "AHN.xcframework")
  : .systemLibrary(name: "CAHN", path: "include")

// mlx.metallib cannot be signed in Frameworks; it is a resource of the package.
let kernels = FileManager.default.fileExists(
  atPath: directory.appendingPathComponent("swift/Sources/AHN/mlx.metallib").path)

let package = Package(
  name: "AHN",
  platforms: [.macOS(.v14)],
  products: [.library(name: "AHN", targets: ["AHN"])],
  targets: [
    library,
    .target(
      name: "AHN", dependencies: ["CAHN"], path: "swift/Sources/AHN",
      resources: kernels ? [.copy("mlx.metallib")] : [],
      swiftSettings: kernels ? [.define("AHN_BUNDLED_KERNELS")] : []),
    .testTarget(name: "AHNTests", dependencies: ["AHN"], path: "swift/Tests/AHNTests"),
  ]
)
